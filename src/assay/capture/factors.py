"""The per-sample gradients that one use of a weight leaves, in the factored form in which they come.

`g_i` is never written out where it need not be: a linear layer leaves the pair (activations, output gradients), an
embedding the pair (indices, output gradients). What the methods ask of a factored gradient is the same for all:
inner products with known directions, and the dense per-sample gradients for reference.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.contraction import directional, per_sample_products
from assay.capture.layout import Layout
from assay.capture.marks import Directions, Weight, directional_derivative

__all__ = ["Dense", "Directional", "Elementwise", "Factors", "Lookup", "Outer", "apart_from", "contract"]


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
class Elementwise:
    """`Dense` before the sum over a sample's entries: a weight that multiplies or shifts the output entry by entry.

    Args:
        parts: gradients of the weight spread over the output, of the output's shape.
        layout: where the samples are in it.
        shape: of the weight, with dimensions of size 1 so that it broadcasts to the output.
        weight_shape: its own.
    """

    parts: Tensor
    layout: Layout
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩."""
        return self.summed().dot(directions)

    def summed(self) -> Dense:
        """The sum over a sample's entries."""
        return Dense(summed_to(self.parts, self.layout, self.shape).reshape(-1, *self.weight_shape))


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


def summed_to(x: Tensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """`[B, *shape]`: x summed over a sample's rows and over the dimensions in which `shape` broadcasts to it."""
    padded = (1,) * (x.dim() - len(shape)) + shape
    rest = padded[: layout.dim] + padded[layout.dim + 1 :]  # no extent along the samples' own dimension
    x = x.movedim(layout.dim, 0)
    dims = [d + 1 for d, size in enumerate(rest) if size == 1 and x.shape[d + 1] != 1]
    x = x.sum(dims, keepdim=True) if dims else x
    return layout.at(0).per_sample_sum(x, keep=x.dim() - 1).reshape(layout.batch, *shape)


@dataclass(frozen=True)
class Patches(Directional):
    """`g_i = Σ_l b_il ⊗ patch_il` of a convolution in one group, b `[B, p, …]`.

    `call(kernels [r, …])` takes any number of kernels, and answers every patch's inner products with them.
    """

    def products(self, matrix: Tensor | None) -> Tensor:
        """`[B, positions, r]`: each patch times the rows of a matrix `[r, patch]`; None gives the patches."""
        weight = self.primals[self.operand]
        if matrix is None:
            matrix = torch.eye(weight[0].numel(), device=weight.device)
        kernels = matrix.to(weight.dtype).reshape(-1, *weight.shape[1:])
        return self.call(kernels).flatten(2).mT


def apart_from(factors: Factors, storages: Container[int]) -> Factors:
    """The same factors, with copies of those tensors whose memory is among `storages`.

    Autograd may hand a parameter a piece of an output's gradient as its `.grad`; what is kept must not change when
    that is clipped or added to.
    """

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in storages:
            return value.clone()
        return (
            apart_from(cast("Factors", value), storages)
            if is_dataclass(value) and hasattr(value, "dot")
            else value
        )

    held = {f.name: getattr(factors, f.name) for f in fields(factors)}  # type: ignore[arg-type]
    copies = {name: copied(value) for name, value in held.items()}
    if all(copies[name] is held[name] for name in held):
        return factors
    return replace(factors, **copies)  # type: ignore[type-var]


def contract(kept: list[tuple[Weight, Factors]], directions: Directions, like: Tensor) -> Tensor:
    """`[groups, targets, B]`: the inner products of kept gradients with directions that became known later.

    Args:
        kept: what the capture kept of one micro-batch.
        directions: `{parameter: [targets, *shape]}`.
        like: the micro-batch's own scores, `[groups, any, B]`.
    """
    targets = next(iter(directions.values())).shape[0]
    scores = like.new_zeros(like.shape[0], targets, like.shape[2])
    for weight, factors in kept:
        for group, pushed in weight.push(directions).items():
            scores[group] += factors.dot(pushed)
    return scores
