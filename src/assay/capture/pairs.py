"""A gradient held as what it is the product of: `G = c Σ_s left_s ⊗ right_s`, of rank S at most.

A linear layer's gradient over a few positions takes `S·(rows + columns)` numbers in place of `rows·columns`. Its inner
product with a sample's gradient, which is such a sum as well, needs no matrix of the weight's shape:

    ⟨g_i, G⟩ = c Σ_ts (left_it · left_s)(right_it · right_s)

(the ghost dot-product of In-Run Data Shapley, arXiv 2406.11011, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.contraction import cost_model
from assay.capture.layout import Layout

__all__ = ["Pair", "are_cheaper", "product", "products", "written_out"]

ENTRIES = 1 << 22  # of the products of all positions with all positions that are formed at once


@dataclass(frozen=True)
class Pair:
    """`factor · Σ_s left_s ⊗ right_s`.

    Args:
        left: `[S, rows]`; or `[S]` whole numbers, the rows of a table that were looked up.
        right: `[S, columns]`.
        factor: c.
    """

    left: Tensor
    right: Tensor
    factor: float = 1.0

    def times(self, factor: float) -> Pair:
        """A multiple."""
        return replace(self, factor=self.factor * factor)

    def __len__(self) -> int:
        return len(self.right)


def written_out(pairs: Sequence[Pair], shape: Sequence[int]) -> Tensor:
    """`[rows, columns]`: their sum, in at least float32.

    Example:
        >>> ones = torch.ones(2, 3)
        >>> written_out([Pair(torch.ones(2, 1), ones), Pair(torch.tensor([0, 0]), ones, 0.5)], (1, 3))
        tensor([[3., 3., 3.]])
    """
    some = pairs[0].right
    wide = torch.promote_types(some.dtype, torch.float32)
    total = torch.zeros(tuple(shape), dtype=wide, device=some.device)
    for pair in pairs:
        right = pair.right.to(wide)
        if pair.left.dim() == 1:
            total.index_add_(0, pair.left, right, alpha=pair.factor)
        else:
            total.addmm_(pair.left.to(wide).t(), right, alpha=pair.factor)
    return total


def are_cheaper(
    batch: int,
    positions: int,
    shape: Sequence[int],
    pairs: Sequence[Sequence[Pair]],
    device: str,
    rides: bool,
) -> bool:
    """Whether products of positions take less time than to write the targets' gradients out and contract those.

    Args:
        batch: B.
        positions: of one sample.
        shape: of the weight.
        pairs: of each target.
        device: its kind.
        rides: the per-sample gradients could replace the weight gradient's own product.
    """
    cost, (rows, columns) = cost_model(device), shape
    held = sum(len(pair) for own in pairs for pair in own)
    ghost = batch * positions * held * (2 * (rows + columns) * cost.per_flop + 2 * cost.per_entry)
    dense = rows * columns * (2 * held * cost.per_flop + 2 * len(pairs) * cost.per_entry)
    contracted = cost.directional(batch, positions, rows, columns, len(pairs))
    if rides:
        contracted = min(contracted, cost.batched(batch, rows, columns, len(pairs)))
    return ghost < dense + contracted


def products(left: Tensor, right: Tensor, layout: Layout, pairs: Sequence[Sequence[Pair]]) -> Tensor:
    """`[targets, B]`: ⟨Σ_t left_it ⊗ right_it, G_n⟩.

    Args:
        left: `[…, rows]`, or `[…]` whole numbers.
        right: `[…, columns]`.
        layout: where the samples are in right.
        pairs: of each target.
    """
    return torch.stack([sum_of(left, right, layout, own) for own in pairs])


def sum_of(left: Tensor, right: Tensor, layout: Layout, pairs: Sequence[Pair]) -> Tensor:
    """`[B]`: for one target."""
    wide = torch.promote_types(right.dtype, torch.float32)
    total = torch.zeros(right.shape[:-1], dtype=wide, device=right.device)
    for pair in pairs:
        block = max(1, ENTRIES // max(total.numel(), 1))
        for start in range(0, len(pair), block):
            part = slice(start, start + block)
            met = product(right, pair.right[part]).mul_(product(left, pair.left[part], wide))
            total += met.sum(-1) * pair.factor
    return layout.per_sample_sum(total)


def product(x: Tensor, y: Tensor, wide: torch.dtype | None = None) -> Tensor:
    """`[…, S]`: the inner product of every row of x with every row of y; whole numbers stand for unit vectors.

    Example:
        >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([1, 1, 0]))
        tensor([[2., 2., 1.]])
    """
    looked_up = not x.is_floating_point(), not y.is_floating_point()
    if all(looked_up):
        return (x[..., None] == y).to(wide or torch.float32)
    some = y if looked_up[0] else x
    wide = torch.promote_types(some.dtype, torch.float32)
    if looked_up[0]:
        return F.embedding(x, y.t().to(wide))
    if looked_up[1]:
        return x.to(wide)[..., y]
    return x.to(wide) @ y.to(wide).t()
