"""The projection of one parameter's gradients, and the coordinates that it reads.

Either from both sides, P_o g P_iᵀ, or as a sketch of the entries that it reads. A side may be read at a few of its
coordinates only: with S the rows of the identity that belong to them, P acts on S_o g S_iᵀ = g[rows, columns] and needs
no more of g, also where a diagonal D stands in between: S_o (D ⊙ g) S_iᵀ = D[rows, columns] ⊙ g[rows, columns]. So does
FactGraSS: a random mask on both factors of a gradient, then a sparse projection of the masked gradient's entries (Hu et
al., arXiv 2505.18976).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["PARTS", "Sides", "chosen", "one_of_each_run", "run_lengths"]

PARTS = ("left", "right", "rows", "columns", "entries", "signs")  # the tensors of `Sides`


@dataclass(frozen=True)
class Sides:
    """The projection P of one parameter, seen as a matrix `[rows, columns]`: its first dimension by all others.

    Args:
        shape: the parameter's shape.
        left: `[r0, rows that are read]`; None leaves that side as it is.
        right: `[r1, columns that are read]`; None likewise.
        rows: `[s0]` int64, the rows that are read, ascending; None reads all.
        columns: `[s1]`, the columns; None likewise.
        entries: `[r0, r1, n]` int64, in the place of left and right: which of the entries that are read, `[s0·s1]` row
            by row, each number of a sketch is a sum of.
        signs: `[r0, r1, n]`, what they are multiplied by.

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
    entries: Tensor | None = None
    signs: Tensor | None = None

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
        """The projection of the sub-matrix that is read, as of a parameter of its own."""
        if not self.narrow:
            return self
        rows, columns = self.matrix
        rows = rows if self.rows is None else len(self.rows)
        columns = columns if self.columns is None else len(self.columns)
        return replace(self, shape=(rows, columns), rows=None, columns=None)

    @property
    def ranks(self) -> tuple[int, int]:
        """r0 and r1."""
        if self.entries is not None:
            return self.entries.shape[0], self.entries.shape[1]
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
        found = {name: getattr(self, name) for name in PARTS}
        return replace(self, **{name: x.to(device) for name, x in found.items() if x is not None})

    def read(self, x: Tensor) -> Tensor:
        """`[…, s0, s1]`: what is read of x `[…, rows, columns]`."""
        if self.rows is not None:
            x = x.index_select(-2, self.rows)
        return chosen(x, self.columns)

    def entries_of(self, x: Tensor) -> Tensor:
        """`[s0, s1]`: what is read of x `[*shape]`; x itself if it is that already."""
        return x if x.shape == self.within.matrix else self.read(x.reshape(self.matrix))

    def applied(self, x: Tensor) -> Tensor:
        """`[…, r0, r1]`: P x of what is read of it, x `[…, s0, s1]`."""
        if self.entries is not None:
            return self.summed(self.dealt(x))
        left = x if self.left is None else self.left.to(x.dtype) @ x
        return left if self.right is None else left @ self.right.to(x.dtype).t()

    def dealt(self, x: Tensor) -> Tensor:
        """`[…, r0, r1, n]`: what is read of x, `[…, s0, s1]`, in the order of a sketch's sums."""
        assert self.entries is not None
        return x.flatten(-2)[..., self.entries.flatten()].view(*x.shape[:-2], *self.entries.shape)

    def summed(self, parts: Tensor, through: Tensor | None = None) -> Tensor:
        """`[…, r0, r1]`: the sums of a sketch, of `dealt` entries; times those of a diagonal, `[s0, s1]`, if given."""
        assert self.signs is not None
        signs = self.signs if through is None else self.signs * self.dealt(through)
        summed: Tensor = (parts * signs.to(parts.dtype)).sum(-1)
        return summed

    def whole(self) -> Sides:
        """The same two sides with a column for every coordinate, nothing at those that are not read."""
        if not self.narrow:
            return self
        rows, columns = self.matrix
        left, right = _spread(self.left, self.rows, rows), _spread(self.right, self.columns, columns)
        return replace(self, left=left, right=right, rows=None, columns=None)

    def directions(self, like: Tensor) -> Iterator[Tensor]:
        """`[r1, *shape]`, r0 times: the rows of P, as directions of the parameter, on the device of `like`."""
        eye = {"dtype": like.dtype, "device": like.device}
        rows, columns = self.matrix
        if self.entries is None or self.signs is None:
            own = self.whole()
            left = torch.eye(rows, **eye) if own.left is None else own.left.to(**eye)  # type: ignore[call-overload]
            right = torch.eye(columns, **eye) if own.right is None else own.right.to(**eye)  # type: ignore[call-overload]
            for row in left:
                yield (row[None, :, None] * right[:, None, :]).reshape(-1, *self.shape)
            return
        s0, s1 = self.within.matrix
        for entries, signs in zip(self.entries, self.signs, strict=True):
            found = torch.zeros(len(entries), s0 * s1, **eye).scatter_add_(1, entries, signs.to(**eye))  # type: ignore[call-overload]
            left, right = _spread(None, self.rows, rows), _spread(None, self.columns, columns)
            found = found.view(-1, s0, s1)
            found = found if left is None else left.to(**eye).t() @ found  # type: ignore[call-overload]
            found = found if right is None else found @ right.to(**eye)  # type: ignore[call-overload]
            yield found.reshape(-1, *self.shape)


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
