"""Influence functions on projected gradients (LoGra; Choe et al., arXiv 2405.13954, section 3).

    influence(q, i) = q̂ᵀ (F + λI)⁻¹ ĝ_i = Σ_l q̂_lᵀ (F_l + λ_l I)⁻¹ ĝ_il        λ_l = damping × mean eigenvalue of F_l

with q̂ and ĝ_i the projected gradients of the query's and the example's own losses, and F_l the projected Fisher
matrix of layer l, 1/N Σ_i ĝ_il ĝ_ilᵀ. Positive: the example lowers the query's loss. Over N it is, to first order, how
much the query's loss would rise had the example been left out of a training set of N (Koh and Liang,
arXiv 1703.04730, eq. 2).

Normalised: ℓ-RelatIF divides by √self-influence (Barshan et al., arXiv 2003.11630, section 3.2), "unit" by ‖ĝ_i‖.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from assay.curvature import Block
from assay.errors import InputError
from assay.projection import Layer

__all__ = ["InfluenceFunction", "Normalize"]

Normalize = Literal["relatif", "unit"]


@dataclass(frozen=True)
class InfluenceFunction:
    """The formula, for given curvature and damping.

    Args:
        layers: the layers of a row.
        blocks: each layer's curvature, by name; None for the identity (plain inner products).
        damping: in mean eigenvalues of the layer.

    Raises:
        InputError: the damping is negative or not finite.

    Example:
        >>> from assay.curvature import Diagonal
        >>> layers = [Layer("fc", 0, 2, ("fc.weight",))]
        >>> formula = InfluenceFunction(layers, {"fc": Diagonal(torch.tensor([3.0, 1.0]))}, damping=0.5)
        >>> formula.precondition(torch.tensor([[4.0, 3.0]])) @ torch.tensor([1.0, 0.0])
        tensor([1.])
    """

    layers: Sequence[Layer]
    blocks: Mapping[str, Block] | None
    damping: float

    def __post_init__(self) -> None:
        if not (isinstance(self.damping, (int, float)) and 0 <= self.damping < float("inf")):
            raise InputError(f"damping={self.damping!r} must be a number of at least 0, such as 0.1.")

    def precondition(self, queries: Tensor) -> Tensor:
        """`[Q, width]`: (F + λI)⁻¹ q̂ for queries q̂ `[Q, width]`."""
        if self.blocks is None:
            return queries
        parts = [
            self.blocks[layer.name].solve(queries[:, layer.columns], self.damping) for layer in self.layers
        ]
        return torch.cat(parts, 1)

    def self_influence(self, rows: Tensor) -> Tensor:
        """`[n]`: ĝ_iᵀ (F + λI)⁻¹ ĝ_i."""
        if self.blocks is None:
            return rows.square().sum(1)
        total = rows.new_zeros(len(rows))
        for layer in self.layers:
            total += self.blocks[layer.name].quadratic(rows[:, layer.columns], self.damping)
        return total
