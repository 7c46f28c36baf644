"""Scores of all rows for given directions, piece by piece, and the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from assay.errors import InputError
from assay.methods.influence import Normalize
from assay.projection import Layer
from assay.rows import RowReader, products

__all__ = ["best_rows", "stream_scores"]

R = TypeVar("R")


def stream_scores(
    rows: RowReader,
    directions: Tensor,
    normalize: Normalize | None = None,
    own: Tensor | None = None,
    layers: Sequence[Layer] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """`(start, [Q, n])`, or `[Q, n, layers]`: inner products of the rows with the directions.

    Args:
        rows: the index's rows.
        directions: `[Q, width]`.
        normalize: None; "relatif" divides by √`own`, "unit" by the length of the row.
        own: `[N]` self-influence, for "relatif".
        layers: whose shares are wanted apart.

    Raises:
        InputError: an unknown `normalize`.
    """
    return _scored(rows, directions, normalize, own, layers, None, lambda start, scores: (start, scores))


def best_rows(
    rows: RowReader,
    directions: Tensor,
    k: int,
    normalize: Normalize | None = None,
    own: Tensor | None = None,
    between: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`[Q, k]` best scores, the highest first, and `[Q, k]` their rows; of equal ones the earlier piece's first.

    Args:
        rows: the index's rows.
        directions: `[Q, width]`.
        k: how many are wanted.
        normalize: see `stream_scores`.
        own: self-influence of the rows asked for, for "relatif".
        between: `(start, stop)` of the rows; all of them by default.

    Raises:
        InputError: an unknown `normalize`.

    Example:
        >>> import polars as pl
        >>> from assay.rows import Folder, RowWriter
        >>> folder = Folder(None)
        >>> writer = RowWriter(folder, width=1, dtype="fp32")
        >>> writer.append(pl.DataFrame({"id": ["a", "b", "c"]}), torch.tensor([[1.0], [5.0], [3.0]]))
        >>> writer.close()
        >>> best_rows(RowReader(folder), torch.tensor([[1.0]]), k=2)
        (tensor([[5., 3.]]), tensor([[1, 2]]))
    """
    best = _Best(directions.new_empty(len(directions), 0), k)
    for found in _scored(rows, directions, normalize, own, None, between, best.of_piece):
        best.take(*found)
    return best.scores, best.rows


class _Best:
    """The best rows so far. Threads look through the pieces; what they find is taken in by one of them."""

    def __init__(self, none: Tensor, k: int) -> None:
        self.scores, self.rows, self.k = none, none.long(), k

    def of_piece(self, start: int, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries for which a piece has something better, its k best scores for them, and their rows."""
        best = self.scores  # perhaps not yet with all that is known: then too much is handed over
        if best.shape[1] < self.k:
            queries = torch.arange(len(scores))
        else:  # few, once the first pieces are through
            queries = (scores.amax(1) > best[:, -1]).nonzero()[:, 0]
        top, at = scores[queries].topk(min(self.k, scores.shape[1]), dim=1)
        return queries, top, at + start

    def take(self, queries: Tensor, top: Tensor, at: Tensor) -> None:
        """Merge what was found; of equal scores, those that are here already come first."""
        if not len(queries):
            return
        scores, order = torch.cat([self.scores[queries], top], 1).sort(dim=1, descending=True, stable=True)
        rows = torch.cat([self.rows[queries], at], 1).gather(1, order)
        if len(queries) == len(self.scores):
            self.rows, self.scores = rows[:, : self.k], scores[:, : self.k]
        else:  # never in place: threads are reading
            self.rows = self.rows.index_copy(0, queries, rows[:, : self.k])
            self.scores = self.scores.index_copy(0, queries, scores[:, : self.k])


def _scored(
    rows: RowReader,
    directions: Tensor,
    normalize: Normalize | None,
    own: Tensor | None,
    layers: Sequence[Layer] | None,
    between: tuple[int, int] | None,
    then: Callable[[int, Tensor], R],
) -> Iterator[R]:
    """What `then(start, scores)` makes of each piece, called by the thread that has the piece."""
    if normalize not in (None, "relatif", "unit"):
        raise InputError(f"normalize={normalize!r} is not known; choose None, 'relatif' or 'unit'.")
    first = 0 if between is None else between[0]

    def normalized(start: int, scores: Tensor, lengths: Tensor | None) -> R:
        if normalize == "relatif":
            assert own is not None
            lengths = own[start - first : start - first + scores.shape[1]].sqrt()
        if lengths is not None:
            by = lengths if layers is None else lengths[:, None]
            scores = torch.where(by > 0, scores / by, 0)  # an example without a gradient did nothing
        return then(start, scores)

    parts = None if layers is None else [layer.columns for layer in layers]
    return products(rows, directions, normalized, parts, normalize == "unit", between)
