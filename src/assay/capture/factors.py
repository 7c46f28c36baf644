"""The per-sample gradients that one use of a weight leaves, in the factored form in which they come.

`g_i` is never written out where it need not be: a linear layer leaves the pair (activations, output gradients), an
embedding the pair (indices, output gradients). What the methods ask of a factored gradient is the same for all:
inner products with known directions, and the dense per-sample gradients for reference.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.contraction import directional, per_sample_products
from assay.capture.layout import Layout
from assay.capture.marks import directional_derivative

__all__ = ["Dense", "Directional", "Factors", "Lookup", "Outer", "apart_from"]


class Factors(Protocol):
    """Per-sample gradients `g_i` of one weight, i = 0 … B−1."""

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩ for directions `[targets, *weight.shape]`."""
        ...


@dataclass(frozen=True)
class Dense:
    """Gradients written out, `[B, *weight.shape]`: biases, norms, scales."""

    gradients: Tensor

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩."""
        wide = torch.promote_types(directions.dtype, self.gradients.dtype)
        flat = directions.reshape(len(directions), -1), self.gradients.reshape(len(self.gradients), -1)
        return flat[0].to(wide) @ flat[1].to(wide).t()


@dataclass(frozen=True)
class Outer:
    """`g_i = Σ_t b_it ⊗ a_it` of a weight `[p, d]`: a `[…, d]` activations, b `[…, p]` output gradients.

    `transposed` says that the weight is stored `[d, p]` (`x @ W`, HF `Conv1D`).
    """

    a: Tensor
    b: Tensor
    layout: Layout
    transposed: bool = False

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩, by the cheaper contraction of the two."""
        a, b = (self.b, self.a) if self.transposed else (self.a, self.b)
        return per_sample_products(a, b, self.layout, directions)


@dataclass(frozen=True)
class Lookup:
    """`g_i` of an embedding `[V, p]`: row `indices` of the weight gets the output gradient b `[…, p]`."""

    indices: Tensor
    b: Tensor
    layout: Layout

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: Σ_t ⟨b_it, G_n[index_it]⟩."""
        wide = torch.promote_types(directions.dtype, self.b.dtype)
        return torch.stack(
            [
                self.layout.per_sample_sum(F.embedding(self.indices, G).to(wide).mul_(self.b))
                for G in directions
            ]
        )


@dataclass(frozen=True)
class Directional:
    """`g_i` of any operation, known only through ⟨g_i, G⟩ = ⟨∂L/∂y_i, ∂y_i/∂W·G⟩ (forward-mode differentiation)."""

    call: Callable[..., Tensor]
    primals: list[Tensor]
    operand: int
    b: Tensor
    layout: Layout

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩."""
        moved = [directional_derivative(self.call, self.primals, {self.operand: G}) for G in directions]
        return directional(moved, self.b, self.layout)


def apart_from(factors: Factors, storages: Container[int]) -> Factors:
    """The same factors, with copies of those tensors whose memory is among `storages`.

    Autograd may hand a parameter a piece of an output's gradient as its `.grad`; what is kept must not change when
    that is clipped or added to.
    """

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in storages:
            return value.clone()
        return value

    held = {f.name: getattr(factors, f.name) for f in fields(factors)}  # type: ignore[arg-type]
    copies = {name: copied(value) for name, value in held.items()}
    if all(copies[name] is held[name] for name in held):
        return factors
    return replace(factors, **copies)  # type: ignore[type-var]
