"""The per-sample gradients that one use of a weight leaves, in the factored form in which they come.

`g_i` is never written out where it need not be: a linear layer leaves the pair (activations, output gradients), an
embedding the pair (indices, output gradients). What the methods ask of a factored gradient is the same for all:
inner products with known directions, and the dense per-sample gradients for reference.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.contraction import directional, per_sample_products
from assay.capture.layout import Layout
from assay.capture.marks import directional_derivative
from assay.errors import CoverageError

__all__ = [
    "Apart",
    "Dense",
    "Directional",
    "Elementwise",
    "Factors",
    "Lookup",
    "Outer",
    "apart_from",
    "own_memory",
]


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
    """`g_i` of any operation, known only through ⟨g_i, G⟩ = ⟨∂L/∂y_i, ∂y_i/∂W·G⟩ (forward-mode differentiation).

    `of` names the parameters and the operation.
    """

    call: Callable[..., Tensor]
    primals: list[Tensor]
    operand: int
    b: Tensor
    layout: Layout
    of: str = field(default="", kw_only=True)

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩.

        Raises:
            CoverageError: torch has no derivative of this operation that would tell.
        """
        try:
            moved = [directional_derivative(self.call, self.primals, {self.operand: G}) for G in directions]
        except NotImplementedError as error:
            raise CoverageError(
                f"{self.of}: torch has neither a forward-mode nor a second derivative of it ({error}), so that no "
                "per-sample gradients can be formed; pass exclude=[...] with these names to leave them out of the "
                "scores (they are then partial), or rewrite the operation."
            ) from error
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
class Apart(Directional):
    """`g_i` of a weight of the output's shape that is added to it: b in the rows of sample i, 0 in all others."""

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: Σ b · G_n over the sample's rows."""
        return directional(list(directions), self.b, self.layout)

    def written_out(self) -> Tensor:
        """`[B, *weight.shape]`."""
        rows = self.b.movedim(self.layout.dim, 0)
        owners = self.layout.row_labels(len(rows), rows.device)
        own = owners == torch.arange(self.layout.batch, device=rows.device)[:, None]  # [B, rows]
        own = own.reshape(*own.shape, *(1,) * (rows.dim() - 1))
        return (rows * own).movedim(1, self.layout.dim + 1)


@dataclass(frozen=True)
class Windows:
    """Where a convolution lays its kernel on its input.

    Args:
        kernel: size of the kernel in each dimension of space.
        stride: steps from one position to the next.
        padding: zeros before and behind.
        dilation: steps between the entries of the kernel.
        groups: of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def unfolded(self, x: Tensor) -> Tensor:
        """`[B, groups, patch, positions]`: what lies under the kernel, of x `[B, channels, …]`.

        Example:
            >>> windows = Windows((2,), (1,), ((0, 1),), (1,), 1)
            >>> windows.unfolded(torch.tensor([[[1.0, 2.0, 3.0]]]))
            tensor([[[[1., 2., 3.],
                      [2., 3., 0.]]]])
        """
        dimensions = len(self.kernel)
        if any(any(sides) for sides in self.padding):
            x = F.pad(x, [size for sides in reversed(self.padding) for size in sides])
        for i, (size, stride, apart) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, apart * (size - 1) + 1, stride)[..., ::apart]
        space = range(2, 2 + dimensions)
        x = x.permute(0, 1, *(d + dimensions for d in space), *space)  # [B, channels, *kernel, *positions]
        return x.reshape(len(x), self.groups, -1, x.shape[2 + dimensions :].numel())


@dataclass(frozen=True)
class Patches(Directional):
    """`g_i = Σ_l b_il ⊗ patch_il` of a convolution, group by group, b `[B, p, …]`.

    `call(kernels, x)` takes any number of kernels; `primals` are the kernels and x.
    """

    windows: Windows

    def projected(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """`[B, r0, r1]`: the gradients seen as `[p, patch]`, between `[r0, p]` and `[r1, patch]`; None keeps a side."""
        weight, x = self.primals
        b, groups = self.b.flatten(2), self.windows.groups  # [B, p, positions]
        if groups > 1:
            patches = self.windows.unfolded(x)
            patches = _wide(
                patches if right is None else right.to(x.dtype) @ patches
            )  # [B, groups, r1, positions]
            b = _wide(b).reshape(len(b), groups, -1, b.shape[-1])
            g: Tensor = (b @ patches.mT).flatten(1, 2)  # [B, p, r1]
            return g if left is None else left.to(g.dtype) @ g
        if right is None:
            patches = self.windows.unfolded(x)[:, 0]
        else:  # the patches' products with the rows of a matrix are a convolution with these for kernels
            patches = self.call(right.to(weight.dtype).reshape(-1, *weight.shape[1:]), x).flatten(2)
        b = b if left is None else left.to(b.dtype) @ b
        return _wide(b) @ _wide(patches).mT


def _wide(x: Tensor) -> Tensor:
    """In at least float32, for sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def apart_from(factors: Factors, storages: Container[int]) -> Factors:
    """The same factors, with copies of those tensors whose memory is among `storages`.

    Autograd may hand a parameter a piece of an output's gradient as its `.grad`; what is kept must not change when
    that is clipped or added to, nor when a loop writes the next micro-batch where this one was.
    """

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return own_memory(value, storages)
        if isinstance(value, list):
            parts = [copied(part) for part in value]
            return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
        factored = is_dataclass(value) and hasattr(value, "dot")
        return apart_from(cast("Factors", value), storages) if factored else value

    held = {f.name: getattr(factors, f.name) for f in fields(factors)}  # type: ignore[arg-type]
    copies = {name: copied(value) for name, value in held.items()}
    if all(copies[name] is held[name] for name in held):
        return factors
    return replace(factors, **copies)  # type: ignore[type-var]


def own_memory(x: Tensor, storages: Container[int]) -> Tensor:
    """A copy where the tensor's memory is among `storages`, the tensor itself where it is not."""
    return x.detach().clone() if x.untyped_storage().data_ptr() in storages else x
