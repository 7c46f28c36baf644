"""The two projections of one parameter, and the coordinates that they read.

A side may be read at a few of its coordinates only: P = R S with S the rows of the identity that belong to them. Then
P_o g P_iᵀ needs the sub-matrix g[rows, columns] and no more, also where a diagonal D stands in between,
P_o (D ⊙ g) P_iᵀ = R_o (D[rows, columns] ⊙ g[rows, columns]) R_iᵀ: the random mask of GraSS (Hu et al., arXiv
2505.18976), on both factors of a gradient as in its FactGraSS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Sides", "chosen", "one_of_each_run", "run_lengths"]


@dataclass(frozen=True)
class Sides:
    """The two projections of one parameter, seen as a matrix `[rows, columns]`: its first dimension by all others.

    Args:
        shape: the parameter's shape.
        left: `[r0, rows that are read]`; None leaves that side as it is.
        right: `[r1, columns that are read]`; None likewise.
        rows: `[s0]` int64, the rows that are read, ascending; None reads all.
        columns: `[s1]`, the columns; None likewise.

    Example:
        >>> sides = Sides((3, 4), columns=torch.tensor([1, 3]))
        >>> sides.read(torch.arange(12).view(3, 4))
        tensor([[ 1,  3],
                [ 5,  7],
                [ 9, 11]])
        >>> sides.ranks
        (3, 2)
    """

    shape: tuple[int, ...]
    left: Tensor | None = None
    right: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the parameter as a matrix; a vector is one column."""
        rows = self.shape[0] if self.shape else 1
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return rows, columns

    @property
    def narrow(self) -> bool:
        """Whether only a sub-matrix is read."""
        return self.rows is not None or self.columns is not None

    @property
    def within(self) -> Sides:
        """The projections of the sub-matrix that is read, as a parameter of its own."""
        if not self.narrow:
            return self
        rows, columns = self.matrix
        rows = rows if self.rows is None else len(self.rows)
        columns = columns if self.columns is None else len(self.columns)
        return Sides((rows, columns), self.left, self.right)

    @property
    def ranks(self) -> tuple[int, int]:
        """r0 and r1."""
        rows, columns = self.within.matrix
        return rows if self.left is None else len(self.left), columns if self.right is None else len(
            self.right
        )

    @property
    def width(self) -> int:
        """Entries of a projected gradient."""
        return self.ranks[0] * self.ranks[1]

    def to(self, device: torch.device) -> Sides:
        """The same on a device."""

        def there(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return Sides(self.shape, there(self.left), there(self.right), there(self.rows), there(self.columns))

    def read(self, x: Tensor) -> Tensor:
        """`[…, s0, s1]`: what is read of x `[…, rows, columns]`."""
        if self.rows is not None:
            x = x.index_select(-2, self.rows)
        return chosen(x, self.columns)

    def whole(self) -> Sides:
        """The same projections with a column for every coordinate, nothing at those that are not read."""
        if not self.narrow:
            return self
        rows, columns = self.matrix
        left, right = _spread(self.left, self.rows, rows), _spread(self.right, self.columns, columns)
        return replace(self, left=left, right=right, rows=None, columns=None)


def chosen(x: Tensor, entries: Tensor | None) -> Tensor:
    """`[…, s]`: some entries of the last dimension of x; None takes all."""
    if entries is None:
        return x
    if x.dim() == 2 or not x.is_contiguous():
        return x.index_select(-1, entries)
    flat = x.view(-1, x.shape[-1]).index_select(1, entries)  # torch is five times as fast in two dimensions
    return flat.view(*x.shape[:-1], len(entries))


def one_of_each_run(width: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`[count]` coordinates, one drawn from each of so many runs of neighbours, and the root of each run's length.

    With S the rows of the identity of these coordinates times that root, E[SᵀS] = I.
    """
    lengths = run_lengths(width, count)
    offsets = (torch.rand(count, generator=generator, dtype=torch.float64) * lengths).long()
    return lengths.cumsum(0) - lengths + offsets, lengths.double().sqrt().float()


def run_lengths(width: int, count: int) -> Tensor:
    """`[count]`: lengths of runs of neighbours, nearly the same for all, that make up a side.

    Example:
        >>> run_lengths(10, 4).tolist()
        [2, 3, 2, 3]
    """
    return (torch.arange(count + 1) * width).div(count, rounding_mode="floor").diff()


def _spread(matrix: Tensor | None, read: Tensor | None, width: int) -> Tensor | None:
    if read is None:
        return matrix
    if matrix is None:
        matrix = torch.eye(len(read), device=read.device)
    return matrix.new_zeros(len(matrix), width).index_copy_(1, read, matrix)
