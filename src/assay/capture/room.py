"""Memory that is used again: the per-sample gradients that wait for the optimizer's step, of one step after the other.

On a CPU the system hands out blocks of this size page by page, each page zeroed at its first touch, and takes them back
as soon as they are free. That costs about half as much as the matrix product that is written into them. Blocks begin
where a cache line does: a product that is written across two lines at a time takes longer.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Room"]

LARGE = 1 << 20  # bytes; smaller blocks stay with the process anyway
LINE = 64  # bytes of a cache line, of the widest vector, and what torch's own memory is aligned to
Block = npt.NDArray[Any]


class Room:
    """Hands out tensors whose memory comes back by itself when nothing refers to it any more.

    Example:
        >>> room = Room()
        >>> place = room.empty([512, 1024], torch.float32, torch.device("cpu")).data_ptr()
        >>> room.empty([1024, 512], torch.float32, torch.device("cpu")).data_ptr() == place
        True
    """

    def __init__(self) -> None:
        self._free: list[Block] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor that is not filled."""
        size = prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < LARGE:  # a GPU's allocator does the same by itself
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._block(size)
        handed = block[:size]
        weakref.finalize(handed, self._free.append, block).atexit = False
        filled = torch.from_numpy(handed)  # holds `handed` as long as its memory is used
        return filled.view(dtype).view(*shape)

    def clear(self) -> None:
        """Let go of what is not used now."""
        self._free.clear()

    def _block(self, size: int) -> Block:
        """The smallest free block that is large enough; none is wasted on a tensor of less than half its size."""
        fit = [n for n, block in enumerate(self._free) if size <= len(block) <= 2 * size]
        if fit:
            return self._free.pop(min(fit, key=lambda n: len(self._free[n])))
        del self._free[:1]  # sizes have changed: what is held stays bounded by what was used at once
        block = np.empty(size + LINE, np.uint8)
        first = -block.ctypes.data % LINE
        return block[first : first + size]
