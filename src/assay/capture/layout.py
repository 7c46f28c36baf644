"""Where the samples live in a tensor: which dimension, and which of its rows belongs to which sample.

A micro-batch enters the model with one sample per row of dimension 0. Inside, rows are flattened (`[B, T, d]` to
`[B·T, d]`), moved (`[T, B, d]`), cut and joined. A `Layout` follows one tensor through that, so that a gradient can
be summed over exactly the entries that belong to a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from assay.errors import CoverageError

__all__ = ["Layout", "refuse_rows_of_nobody"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Sample `(r // inner) % batch` owns row `r` of dimension `dim`; with `labels`, sample `labels[r]` does.

    Args:
        dim: the dimension (non-negative) that carries the samples.
        batch: B, the number of samples in the micro-batch.
        inner: consecutive rows of one sample: T after `[B, T, d]` was flattened to `[B·T, d]`.
        labels: `[rows]` sample indices, for rows in no regular order (cut, joined or routed); −1 for a row of
            nobody (padding between routed rows), which nothing that counts may use.

    Example:
        >>> Layout(0, batch=2).reshaped((2, 3, 5), (6, 5))
        Layout(dim=0, batch=2, inner=3, labels=None)
        >>> Layout(0, batch=2, inner=3).per_sample_sum(torch.ones(6, 5)).tolist()
        [15.0, 15.0]
    """

    dim: int
    batch: int
    inner: int = 1
    labels: Tensor | None = None

    def same_as(self, other: Layout, rows: int) -> bool:
        """Whether both give each of `rows` rows to the same sample."""
        if self.labels is None and other.labels is None:
            return (self.dim, self.inner) == (other.dim, other.inner)
        if self.labels is other.labels:
            return self.dim == other.dim
        some = self.labels if self.labels is not None else other.labels
        assert some is not None
        mine, theirs = self.row_labels(rows, some.device), other.row_labels(rows, some.device)
        return self.dim == other.dim and torch.equal(mine, theirs)

    def at(self, dim: int) -> Layout:
        """The same rows, now at dimension `dim`."""
        return self if dim == self.dim else Layout(dim, self.batch, self.inner, self.labels)

    def row_labels(self, rows: int, device: torch.device) -> Tensor:
        """`[rows]`: the sample that owns each row."""
        if self.labels is not None:
            return self.labels
        return torch.arange(rows, device=device).div(self.inner, rounding_mode="floor") % self.batch

    def labelled(self, dim: int, labels: Tensor) -> Layout:
        """Rows in an order of their own."""
        return Layout(dim, self.batch, 1, labels)

    def reshaped(self, old: Sequence[int], new: Sequence[int]) -> Layout | None:
        """The layout after a row-major reshape from `old` to `new`; None where the sample axis is broken up."""
        if self.labels is not None:
            return self._relabelled(old[self.dim], prod(old[self.dim + 1 :]), new)
        return _reshaped(self.dim, self.batch, self.inner, tuple(old), tuple(new))

    def _relabelled(self, rows: int, rest: int, new: Sequence[int]) -> Layout | None:
        """`reshaped` for rows in no regular order: their dimension is merged with a neighbour, split, or neither."""
        assert self.labels is not None
        if not rows or not rest:
            return None
        for dim, size in enumerate(new):
            after = prod(new[dim + 1 :])
            if not size or not after or max(size, rows) % min(size, rows):
                continue
            if size >= rows and after == rest:  # merged with dimensions before it
                return self.labelled(dim, self.labels.repeat(size // rows))
            if size >= rows and after * (size // rows) == rest:  # … behind it
                return self.labelled(dim, self.labels.repeat_interleave(size // rows))
            if size < rows and after in (rest, rest * (rows // size)):
                blocks = self.labels.view(-1, size).t() if after == rest else self.labels.view(size, -1)
                if bool((blocks == blocks[:, :1]).all()):
                    return self.labelled(dim, blocks[:, 0])
        return None

    def is_sample_major(self, rows: int) -> bool:
        """Whether the rows of dimension 0 are sample 0's, then sample 1's, …: a plain reshape groups them."""
        return self.dim == 0 and self.labels is None and rows == self.batch * self.inner

    def grouped(self, x: Tensor) -> Tensor:
        """`[B, rows of a sample, …]`: the sample dimension first, the rows of one sample together.

        Only for regular layouts; irregular ones have unequal numbers of rows per sample.
        """
        if self.dim != 0:
            x = x.movedim(self.dim, 0)
        rows = x.shape[0]
        if rows == self.batch * self.inner:
            return x.reshape(self.batch, self.inner, *x.shape[1:])
        x = x.reshape(-1, self.batch, self.inner, *x.shape[1:])  # [outer, B, inner, …]
        return x.movedim(0, 1).flatten(1, 2)

    def per_sample_sum(self, x: Tensor, keep: int = 0) -> Tensor:
        """`[B, *last keep dimensions]`: the sum of a sample's entries of `x`."""
        if not x.numel():
            return x.new_zeros(self.batch, *x.shape[x.dim() - keep :])
        if self.labels is None:
            if self.dim == 0 and self.inner * self.batch == x.shape[0]:
                x = x.reshape(self.batch, -1, *x.shape[x.dim() - keep :])
            else:
                x = self.grouped(x)
                x = x.reshape(self.batch, -1, *x.shape[x.dim() - keep :])
            return x.sum(1)
        x = x.movedim(self.dim, 0)
        x = x.reshape(x.shape[0], -1, *x.shape[x.dim() - keep :]).sum(1)
        out = x.new_zeros(self.batch + 1, *x.shape[1:])
        out.index_add_(0, self.labels % (self.batch + 1), x)  # rows of nobody, label -1, come last
        refuse_rows_of_nobody(out[self.batch])
        return out[: self.batch]


def refuse_rows_of_nobody(total: Tensor) -> None:
    """What rows without a sample add up to must be zero.

    Raises:
        CoverageError: it is not.
    """
    if bool(total.any()):
        raise CoverageError(
            "rows that belong to no sample (padding between the rows of the samples) have a gradient, so that no "
            "sample's share is the whole; drop these rows before they reach the loss."
        )


@lru_cache(maxsize=4096)
def _reshaped(dim: int, batch: int, inner: int, old: tuple[int, ...], new: tuple[int, ...]) -> Layout | None:
    """`Layout.reshaped` for rows in regular order."""
    unit = inner * prod(old[dim + 1 :])  # consecutive elements that belong to one sample
    if not unit:  # nothing in it: any dimension of that size will do
        return next((Layout(at, batch, inner) for at, size in enumerate(new) if size == old[dim]), None)
    for at, size in enumerate(new):
        after = prod(new[at + 1 :])
        if after and unit % after == 0 and (after * size) % (unit * batch) == 0 and size >= batch:
            return Layout(at, batch, unit // after)
    return None
