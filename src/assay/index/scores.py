"""Scores of all rows for given directions, piece by piece, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from assay.errors import InputError
from assay.methods.influence import Normalize
from assay.projection import Layer
from assay.rows import RowReader, products

__all__ = ["best_rows", "stream_scores"]

Pieces = Iterable[tuple[int, Tensor]]


def stream_scores(
    rows: RowReader,
    directions: Tensor,
    normalize: Normalize | None = None,
    own: Tensor | None = None,
    layers: Sequence[Layer] | None = None,
    between: tuple[int, int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """`(start, [Q, n])`, or `[Q, n, layers]`: inner products of the rows with the directions.

    Args:
        rows: the index's rows.
        directions: `[Q, width]`.
        normalize: None; "relatif" divides by √`own`, "unit" by the length of the row.
        own: `[N]` self-influence of the rows asked for, for "relatif".
        layers: whose shares are wanted apart.
        between: `(start, stop)` of the rows; all of them by default.

    Raises:
        InputError: an unknown `normalize`.
    """
    if normalize not in (None, "relatif", "unit"):
        raise InputError(f"normalize={normalize!r} is not known; choose None, 'relatif' or 'unit'.")
    parts = None if layers is None else [layer.columns for layer in layers]
    for start, scores, lengths in products(rows, directions, parts, normalize == "unit", between):
        if normalize == "relatif":
            assert own is not None
            first = start - (0 if between is None else between[0])
            lengths = own[first : first + scores.shape[1]].sqrt()
        if lengths is not None:
            by = lengths if layers is None else lengths[:, None]
            scores = torch.where(by > 0, scores / by, 0)  # an example without a gradient did nothing
        yield start, scores


def best_rows(pieces: Pieces, k: int) -> tuple[Tensor, Tensor]:
    """`[Q, k]` best scores, the highest first, and `[Q, k]` their rows; of equal ones the earlier row first.

    Example:
        >>> scores = torch.tensor([[1.0, 5.0, 3.0, 5.0]])
        >>> best_rows([(0, scores[:, :2]), (2, scores[:, 2:])], k=3)
        (tensor([[5., 5., 3.]]), tensor([[1, 3, 2]]))
    """
    best: Tensor | None = None
    for start, scores in pieces:
        if best is None:
            best = scores.new_empty(len(scores), 0)
            rows = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
        if best.shape[1] < k:
            best, rows = _merged(best, rows, scores, start, k)
            continue
        better = (scores.amax(1) > best[:, -1]).nonzero()[
            :, 0
        ]  # few queries, once the first pieces are through
        if len(better):
            best[better], rows[better] = _merged(best[better], rows[better], scores[better], start, k)
    assert best is not None  # an index has at least one row
    return best, rows


def _merged(best: Tensor, rows: Tensor, scores: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    top, at = scores.topk(min(k, scores.shape[1]), dim=1)
    best, rows = torch.cat([best, top], 1), torch.cat([rows, at + start], 1)
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best[:, :k].contiguous(), rows.gather(1, order)[:, :k].contiguous()
