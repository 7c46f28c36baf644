"""An index built and searched by several workers: the same parts and pieces as one process goes through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from assay.errors import InputError
from assay.index.scores import best_rows
from assay.methods.influence import Normalize
from assay.rows import Folder, RowReader
from assay.workers import Workers

__all__ = ["best_by", "build_by"]

RANGES = 4  # of rows per worker, so that a slow one does not keep the others waiting for long


def build_by(workers: Workers, arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Log one part per worker; how many parts there are to be joined.

    Raises:
        InputError: the index would be in memory, which no worker shares.
    """
    if options["out"] is None:
        raise InputError("Index.build(workers=...): several processes need a folder; give out=.")
    parts = workers.number
    for _ in workers.run(_build_part, ((arguments, options, part, parts) for part in range(parts))):
        pass
    return parts


def _build_part(arguments: tuple[Any, ...], options: dict[str, Any], part: int, parts: int) -> None:
    from assay.index.index import Index

    model, id_batches, loss_fn = arguments
    Index.build_part(model, id_batches, loss_fn, part, parts, **options)


def best_by(
    workers: Workers,
    place: str,
    rows: RowReader,
    directions: Tensor,
    k: int,
    normalize: Normalize | None,
    own: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`[Q, k]` best scores and their rows, see `best_rows`; each worker goes through ranges of the rows.

    Args:
        workers: who search; all of them reach the rows.
        place: of the rows.
        rows: the same rows.
        directions: `[Q, width]`.
        k: rows wanted per query.
        normalize: see `stream_scores`.
        own: `[N]` self-influence, for "relatif".

    Raises:
        InputError: the index is in memory, which no worker shares.
    """
    if place.startswith("memory"):
        raise InputError(
            "search(workers=...): an index in memory is this process's alone; build it with out=."
        )
    tasks = (
        (place, start, stop, directions, k, normalize, None if own is None else own[start:stop])
        for start, stop in _ranges(len(rows), rows.piece_rows(), RANGES * workers.number)
    )
    found = list(workers.run(_best_of_range, tasks))  # [Q, k] each, in the order of the rows
    best, at = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best[:, :k].contiguous(), at.gather(1, order)[:, :k].contiguous()


def _best_of_range(
    place: str,
    start: int,
    stop: int,
    directions: Tensor,
    k: int,
    normalize: Normalize | None,
    own: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return best_rows(RowReader(Folder(place)), directions, k, normalize, own, (start, stop))


def _ranges(total: int, piece: int, number: int) -> Iterator[tuple[int, int]]:
    """About `number` ranges of whole pieces."""
    pieces = -(-total // piece)
    size = piece * max(1, -(-pieces // number))
    for start in range(0, total, size):
        yield start, min(start + size, total)
