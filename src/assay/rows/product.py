"""Inner products of stored rows with known directions, several pieces at once.

Each of as many threads as torch computes with takes whole pieces: it waits for the piece, widens it block by block and
multiplies every block while it is in the processor's cache. The products inside a thread use that thread alone: torch's
own threads would wait for each other after every small block, and for the threads that read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from assay.rows.format import widen
from assay.rows.reader import RowReader

__all__ = ["products"]

BLOCK_BYTES = 2 << 20

Product = tuple[Tensor, Tensor | None]


def products(
    rows: RowReader,
    directions: Tensor,
    parts: Sequence[slice] | None = None,
    lengths: bool = False,
    between: tuple[int, int] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Inner products piece by piece, in order: `(start, [Q, n], [n] or None)`.

    Args:
        rows: the stored rows.
        directions: `[Q, width]`.
        parts: columns whose products are wanted apart, `[Q, n, parts]` then.
        lengths: whether the lengths of the rows are wanted as well.
        between: `(start, stop)` of the rows; all of them by default.
    """
    begin, end = between or (0, len(rows))
    threads, size = torch.get_num_threads(), rows.piece_rows()
    turned = directions.t().contiguous()  # [width, Q]
    waiting: deque[tuple[int, Future[Product]]] = deque()
    rooms: SimpleQueue[npt.NDArray[Any]] = SimpleQueue()
    for _ in range(threads):
        rooms.put(rows.new_room())
    with ThreadPoolExecutor(threads, "assay-product") as pool:
        try:
            for start in range(begin, end, size):
                stop = min(start + size, end)
                waiting.append(
                    (start, pool.submit(_piece, rows, rooms, threads, start, stop, turned, parts, lengths))
                )
                if len(waiting) > threads:
                    first, done = waiting.popleft()
                    yield first, *done.result()
            while waiting:
                first, done = waiting.popleft()
                yield first, *done.result()
        finally:  # the caller may have had enough
            for _, done in waiting:
                done.cancel()


def _piece(
    rows: RowReader,
    rooms: SimpleQueue[npt.NDArray[Any]],
    threads: int,
    start: int,
    stop: int,
    turned: Tensor,
    parts: Sequence[slice] | None,
    lengths: bool,
) -> Product:
    """`[Q, n]` and `[n]` of the rows from start to stop, by this thread alone."""
    room = rooms.get()
    torch.set_num_threads(1)  # of this thread; others keep theirs
    try:
        stored, scales = rows.stored_piece(start, stop, room)
        return _multiplied(stored, scales, rows.manifest.blocks, turned, parts, lengths)
    finally:
        torch.set_num_threads(threads)  # also what threads to come begin with
        rooms.put(room)


def _multiplied(
    stored: Tensor,
    scales: Tensor | None,
    blocks: Sequence[tuple[int, int]],
    turned: Tensor,
    parts: Sequence[slice] | None,
    lengths: bool,
) -> Product:
    n, (width, queries) = len(stored), turned.shape
    size = max(1, BLOCK_BYTES // (width * turned.element_size()))
    room = turned.new_empty(min(size, n), width)
    found = turned.new_empty((n, queries) if parts is None else (len(parts), n, queries))
    norms = turned.new_empty(n) if lengths else None
    for at in range(0, n, size):
        own = slice(at, min(at + size, n))
        wide = widen(stored[own], None if scales is None else scales[own], blocks, room[: own.stop - at])
        if parts is None:
            torch.mm(wide, turned, out=found[own])
        else:
            for number, columns in enumerate(parts):
                torch.mm(wide[:, columns], turned[columns], out=found[number, own])
        if norms is not None:
            torch.linalg.vector_norm(wide, dim=1, out=norms[own])
    scores = found.t() if parts is None else found.permute(2, 1, 0)
    return scores.contiguous(), norms
