"""Curvature of the training loss, layer by layer, and its damped inverse.

* `Fisher`: F = 1/N Σ_i ĝ_i ĝ_iᵀ over the projected gradients of one layer (LoGra, arXiv 2405.13954, section 3).
* `Diagonal`: eigenvalues in the basis in which the gradients are written. With principal axes for a basis and
  E[ĝ²] for eigenvalues this is EKFAC (George et al., arXiv 1806.03884, section 3); with products of the eigenvalues of
  the two KFAC covariances it is KFAC (Martens and Grosse, arXiv 1503.05671).

The damping is relative: λ = damping × the mean eigenvalue of that layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from assay.capture import Weights
from assay.capture.bottleneck import written_out
from assay.capture.factors import Factors, Lookup, Outer
from assay.capture.marks import Weight
from assay.capture.sides import Sides, run_lengths
from assay.errors import InputError

__all__ = ["Block", "Covariances", "Diagonal", "Fisher"]

WIDEST = (
    8192  # columns of a side whose covariance is formed; wider ones (vocabularies) get random projections
)


class Block(Protocol):
    """The curvature of one layer."""

    def solve(self, rows: Tensor, damping: float) -> Tensor:
        """`[B, width]`: (F + λI)⁻¹ ĝ for rows ĝ `[B, width]`."""
        ...

    def quadratic(self, rows: Tensor, damping: float) -> Tensor:
        """`[B]`: ĝᵀ (F + λI)⁻¹ ĝ."""
        ...


@dataclass
class Fisher:
    """A layer's Fisher matrix, whole.

    Args:
        matrix: `[width, width]`.
        name: of the layer, for errors.

    Example:
        >>> fisher = Fisher(torch.diag(torch.tensor([3.0, 1.0])))
        >>> fisher.solve(torch.tensor([[4.0, 3.0]]), damping=0.5)  # λ = 0.5 · 2
        tensor([[1.0000, 1.5000]])
    """

    matrix: Tensor
    name: str = ""
    _factor: tuple[float, Tensor] | None = field(default=None, repr=False)

    def solve(self, rows: Tensor, damping: float) -> Tensor:
        """`[B, width]`: (F + λI)⁻¹ ĝ, by Cholesky in float64."""
        lower = self._lower(damping)
        if lower is None:
            return torch.zeros_like(rows)
        solved: Tensor = torch.cholesky_solve(rows.double().t(), lower)
        return solved.t().to(rows.dtype)

    def quadratic(self, rows: Tensor, damping: float) -> Tensor:
        """`[B]`: ĝᵀ (F + λI)⁻¹ ĝ."""
        lower = self._lower(damping)
        if lower is None:
            return rows.new_zeros(len(rows))
        half: Tensor = torch.linalg.solve_triangular(lower.to(rows.dtype), rows.t(), upper=False)
        return half.square().sum(0)

    def _lower(self, damping: float) -> Tensor | None:
        """The Cholesky factor; None for a layer in which no example ever had a gradient."""
        if self._factor is None or self._factor[0] != damping:
            matrix = self.matrix.double()
            mean = float(matrix.diagonal().mean())
            if mean <= 0:
                return None
            damped = matrix + damping * mean * torch.eye(
                len(matrix), dtype=matrix.dtype, device=matrix.device
            )
            lower, failed = torch.linalg.cholesky_ex(damped)
            diagonal = lower.diagonal()
            if int(failed) or float(diagonal.min()) <= 1e-7 * float(diagonal.max()):
                raise InputError(
                    f"damping={damping}: the Fisher matrix of layer {self.name!r} is singular with so little of it; "
                    "use a larger damping, such as 0.1."
                )
            self._factor = (damping, lower)
        return self._factor[1]


@dataclass(frozen=True)
class Diagonal:
    """A layer's curvature in its own eigenbasis.

    Args:
        eigenvalues: `[width]`.
        name: of the layer, for errors.

    Example:
        >>> Diagonal(torch.tensor([3.0, 1.0])).solve(torch.tensor([[4.0, 3.0]]), damping=0.5)
        tensor([[1.0000, 1.5000]])
    """

    eigenvalues: Tensor
    name: str = ""

    def solve(self, rows: Tensor, damping: float) -> Tensor:
        """`[B, width]`: ĝ over the damped eigenvalues."""
        return rows * self._inverse(damping).to(rows.dtype)

    def quadratic(self, rows: Tensor, damping: float) -> Tensor:
        """`[B]`: ĝᵀ (F + λI)⁻¹ ĝ."""
        return rows.square() @ self._inverse(damping).to(rows.dtype)

    def _inverse(self, damping: float) -> Tensor:
        values = self.eigenvalues.double()
        mean = float(values.mean())
        if mean <= 0:
            return torch.zeros_like(values)
        damped = values + damping * mean
        if bool((damped <= 0).any()):
            raise InputError(
                f"damping={damping}: layer {self.name!r} has directions without curvature; use a larger damping, "
                "such as 0.1."
            )
        return 1 / damped


class Covariances:
    """Uncentred KFAC covariances of the two sides of every parameter, summed over micro-batches.

    For a linear layer A = E[a aᵀ] over examples and positions and S = E[Σ_t b_t b_tᵀ] over examples, b the gradient of
    the example's own loss; for everything else the same of the written-out gradients, E[gᵀg] and E[g gᵀ].

    Args:
        weights: the watched parameters.
        sides: their shapes, by name.
    """

    def __init__(self, weights: Weights, sides: Mapping[str, Sides]) -> None:
        self._weights = weights
        self._sides = sides
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}
        self.examples = 0
        self._positions: dict[str, int] = {}

    def add(self, weight: Weight, factors: Factors, scale: float) -> None:
        """Add one use; `scale` turns the gradients into those of the examples' own losses."""
        if len(weight.params) == 1 and weight is self._weights.marks[id(weight.params[0])]:
            name = self._weights.names[weight.params[0]]
            if isinstance(factors, Outer):
                a, b = _rows(factors.a), _rows(factors.b) * scale
                self._positions[name] = self._positions.get(name, 0) + len(a)
                left, right = (a, b) if factors.transposed else (b, a)
                self._sum(self.left, name, left, 0)
                self._sum(self.right, name, right, 1)
                return
            if isinstance(factors, Lookup):  # A of one-hot inputs holds frequencies: its axes are the tokens
                self._sum(self.right, name, _rows(factors.b) * scale, 1)
                return
        for param, g in written_out(weight, factors).items():
            name = self._weights.names[param]
            rows, columns = self._sides[name].matrix
            dense = g.reshape(-1, rows, columns) * scale
            self._sum(self.left, name, dense.mT.reshape(-1, rows), 0)
            self._sum(self.right, name, dense.reshape(-1, columns), 1)

    def sides(self, rank: int | None, others: Mapping[str, Sides]) -> dict[str, Sides]:
        """Each parameter's projections on the leading eigenvectors, the largest eigenvalue first.

        Args:
            rank: how many; None takes all.
            others: the coordinates that are read, and what to use for sides without a covariance (vocabularies), by
                name.
        """
        found = {}
        for name, other in others.items():
            left = _axes(self.left.get(name), rank, other.rows)
            right = _axes(self.right.get(name), rank, other.columns)
            found[name] = replace(
                other,
                left=other.left if left is None else left,
                right=other.right if right is None else right,
            )
        return found

    def eigenvalues(self, sides: Mapping[str, Sides]) -> dict[str, Tensor]:
        """`[r0·r1]` by name: the Kronecker products' eigenvalues along these sides, λ_A·λ_S.

        Curvature along projected directions is P A Pᵀ; a parameter with a side that has no covariance is left out.
        """
        found = {}
        for name, own in ((name, own.whole()) for name, own in sides.items()):
            rows, columns = own.matrix
            left = _along(self.left.get(name), own.left, rows)
            right = _along(self.right.get(name), own.right, columns)
            if left is None or right is None or not self.examples:
                continue
            count = self._positions.get(name)
            if (
                count is not None
            ):  # one side holds activations, a sum over positions; the other output gradients
                scale = 1 / (count * self.examples)
            elif columns == 1:
                scale = 1 / self.examples
            else:  # Shampoo's estimate of the Kronecker factors: tr(E[gᵀg]) = tr(E[g gᵀ]) counts once
                scale = 1 / (self.examples * float(torch.trace(self.left[name])))
            found[name] = (left[:, None] * right[None, :]).flatten() * scale
        return found

    def _sum(self, into: dict[str, Tensor], name: str, rows: Tensor, side: int) -> None:
        width = self._sides[name].matrix[side]
        if width > WIDEST or width == 1:
            return
        product = rows.t() @ rows
        into[name] = into[name] + product if name in into else product


def _axes(covariance: Tensor | None, rank: int | None, read: Tensor | None) -> Tensor | None:
    """`[rank, width]`: leading eigenvectors; None where there is no covariance.

    Where only some coordinates are read, those of their own covariance, each weighed by the run that it stands for.
    """
    if covariance is None:
        return None
    covariance, weights = covariance.double(), None
    if read is not None:
        weights = run_lengths(len(covariance), len(read)).to(covariance).sqrt()
        covariance = covariance[read][:, read] * weights[:, None] * weights
    vectors = torch.linalg.eigh(covariance)[1].flip(1).t()
    signs = vectors.gather(
        1, vectors.abs().argmax(1, keepdim=True)
    ).sign()  # an eigenvector's sign is arbitrary
    axes: Tensor = (vectors * signs)[:rank]
    return (axes if weights is None else axes * weights).contiguous()


def _along(covariance: Tensor | None, axes: Tensor | None, width: int) -> Tensor | None:
    """`[r]`: the diagonal of P A Pᵀ; ones for the single column of a vector."""
    if width == 1:
        return torch.ones(1, dtype=torch.float64)
    if covariance is None or axes is None:
        return None
    P = axes.to(torch.float64)
    return ((P @ covariance.to(P)) * P).sum(1)


def _rows(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.reshape(-1, x.shape[-1]).to(wide)
