"""Tensors that a step finds, made outside of it: which of them carry samples.

Their rows tell: as many as the batch has samples. A constant (a mask, the features of fixed prompts) may have so many
by chance where batches differ in size. So the first sight counts: what came with other rows than the batch's then
stays a constant, the same tensor of the same shape, however large a later batch is.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

from torch import Size, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Outside"]


class Outside:
    """What was made of each tensor at its first sight; held weakly, so that nothing lives longer for it.

    Example:
        >>> import torch
        >>> outside, mask, buffer = Outside(), torch.ones(4, 3), torch.ones(8, 3)
        >>> [outside.carries(mask, batch=8), outside.carries(buffer, batch=8)]
        [False, True]
        >>> outside.carries(mask, batch=4)  # it has become no sample since
        False
    """

    def __init__(self) -> None:
        # tensor: its shape then, whether it is a constant
        self._first: MutableMapping[Tensor, tuple[Size, bool]] = WeakTensorKeyDictionary()

    def carries(self, tensor: Tensor, batch: int) -> bool:
        """Whether the rows of a tensor are the samples of a batch; the first call for a tensor is its first sight."""
        fits = _fits(tensor, batch)
        shape, constant = self._seen(tensor)
        if shape != tensor.shape:
            constant = not fits
            self._first[tensor] = (tensor.shape, constant)
        return fits and not constant

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor was a constant at its first sight."""
        shape, constant = self._seen(tensor)
        return constant and shape == tensor.shape

    def keep_constant(self, tensor: Tensor) -> None:
        """A tensor is a constant, whatever its rows: the copy of one."""
        self._first[tensor] = (tensor.shape, True)

    def expect(self, tensors: Sequence[Tensor], batch: int) -> None:
        """Some of these carry the samples: if all that have the rows for it were constants before, none of them is.

        So it is with buffers that every batch is written into, where a smaller batch met them first.
        """
        fitting = [tensor for tensor in tensors if _fits(tensor, batch)]
        if all(self.is_constant(tensor) for tensor in fitting):
            for tensor in fitting:
                self._first[tensor] = (tensor.shape, False)

    def _seen(self, tensor: Tensor) -> tuple[Size | None, bool]:
        return self._first.get(tensor, (None, False))


def _fits(tensor: Tensor, batch: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == batch
