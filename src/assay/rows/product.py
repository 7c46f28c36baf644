"""Inner products of stored rows with known directions, several pieces at once.

Each of as many threads as torch computes with takes whole pieces: it waits for the piece, widens it block by block and
multiplies every block while it is in the processor's cache. The products inside a thread use that thread alone: torch's
own threads would wait for each other after every small block, and for the threads that read. What is to be done with a
piece's products is done by the same thread, for the same reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from assay.rows.format import widen
from assay.rows.reader import RowReader

__all__ = ["products"]

BLOCK_BYTES = 2 << 20

R = TypeVar("R")


def products(
    rows: RowReader,
    directions: Tensor,
    then: Callable[[int, Tensor, Tensor | None], R],
    parts: Sequence[slice] | None = None,
    lengths: bool = False,
    between: tuple[int, int] | None = None,
) -> Iterator[R]:
    """Inner products piece by piece: what `then` makes of each, in the order of the rows.

    Args:
        rows: the stored rows.
        directions: `[Q, width]`.
        then: `then(start, products, lengths)` is given the first row of a piece, `[Q, n]` and `[n]` or None, and is
            called by the thread that has multiplied it.
        parts: columns whose products are wanted apart, `[Q, n, parts]` then.
        lengths: whether the lengths of the rows are wanted as well.
        between: `(start, stop)` of the rows; all of them by default.
    """
    begin, end = between or (0, len(rows))
    threads, size = torch.get_num_threads(), rows.piece_rows()
    turned = directions.t().contiguous()  # [width, Q]
    waiting: deque[Future[R]] = deque()
    rooms: SimpleQueue[npt.NDArray[Any]] = SimpleQueue()
    for _ in range(threads):
        rooms.put(rows.new_room())
    with ThreadPoolExecutor(threads, "assay-product") as pool:
        try:
            for start in range(begin, end, size):
                stop = min(start + size, end)
                waiting.append(
                    pool.submit(_piece, rows, rooms, threads, start, stop, turned, then, parts, lengths)
                )
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the caller may have had enough
            for done in waiting:
                done.cancel()


def _piece(
    rows: RowReader,
    rooms: SimpleQueue[npt.NDArray[Any]],
    threads: int,
    start: int,
    stop: int,
    turned: Tensor,
    then: Callable[[int, Tensor, Tensor | None], R],
    parts: Sequence[slice] | None,
    lengths: bool,
) -> R:
    """What `then` makes of the rows from start to stop, by this thread alone."""
    room = rooms.get()
    torch.set_num_threads(1)  # of this thread; others keep theirs
    try:
        stored, scales = rows.stored_piece(start, stop, room)
        return then(start, *_multiplied(stored, scales, rows.manifest.blocks, turned, parts, lengths))
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
) -> tuple[Tensor, Tensor | None]:
    """`[Q, n]` and `[n]`."""
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
