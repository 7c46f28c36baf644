"""H λ from the uses of the weights: where a Hessian's product enters the graph of a gradient.

The inner products of the samples with λ add up to ⟨∇L, λ⟩ = Σ over the uses of ⟨b, aΛᵀ⟩, with a the activations, b the
gradients of the output and Λ the direction of the weight, and the gradient of that is H λ. Its derivatives with respect
to a and b are b Λ and a Λᵀ, the latter being what the inner products are made of anyway: so each use hands them to
autograd as they are, and no weight gradient is formed. For a matrix this is as few products as there can be: of eight,
two (the forward pass, and the gradient of the activations) serve all directions, and six are each direction's own
(Pearlmutter, Neural Computation 6, 1994, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.factors import Dense, Factors, Lookup, Outer
from assay.capture.layout import Layout
from assay.capture.marks import Directions, Weight

__all__ = ["Links", "entries", "links", "stacked"]

Uses = Sequence[tuple[Weight, Factors]]


class Links:
    """Where the products start, and what with.

    Args:
        scores: `[queries, B]`: ⟨g_i, λ⟩.
        roots: tensors of the gradient's graph.
        slopes: `[queries, *root.shape]` each: the derivative of Σ_i ⟨g_i, λ⟩ with respect to them.
    """

    def __init__(self, scores: Tensor, roots: list[Tensor], slopes: list[Tensor]) -> None:
        self.scores, self.roots, self.slopes = scores, roots, slopes


def links(uses: Uses, directions: Directions, like: Tensor) -> Links:
    """The links of one micro-batch.

    Args:
        uses: of the weights, as the capture explains them in a gradient that has a graph of its own.
        directions: `{parameter: [queries, *shape]}`, λ.
        like: `[queries, B]`, of the scores' number format.
    """
    found = Links(torch.zeros_like(like), [], [])
    with torch.no_grad():
        for weight, factors in uses:
            for pushed in weight.push(directions).values():
                scores, pairs = _link(factors, pushed)
                found.scores += scores
                for root, slope in pairs:
                    if root.requires_grad:
                        found.roots.append(root)
                        found.slopes.append(slope.to(root.dtype))
    return found


def entries(uses: Uses) -> int:
    """Entries of the largest tensor that a use brings."""
    found = [x.numel() for _, factors in uses for x in _tensors(factors).values()]
    return max(found, default=0)


def _link(factors: Factors, directions: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """`[queries, B]` and (root, slope) of one use."""
    if isinstance(factors, Outer):
        a, b = (factors.b, factors.a) if factors.transposed else (factors.a, factors.b)
        matrices = directions.to(a.dtype)
        of_b = stacked([a @ matrix.t() for matrix in matrices])  # [queries, …, p]
        of_a = stacked([b @ matrix for matrix in matrices])  # [queries, …, d]
        same = (
            (of_b, b) if b.numel() <= a.numel() else (of_a, a)
        )  # ⟨b, aΛᵀ⟩ = ⟨bΛ, a⟩: the smaller of the two
        return _dots(*same, factors.layout), [(b, of_b), (a, of_a)]
    if isinstance(factors, Lookup):
        moved = stacked([F.embedding(factors.indices, table) for table in directions])
        return _dots(moved, factors.b, factors.layout), [(factors.b, moved)]
    if isinstance(factors, Dense):
        spread = directions[:, None].expand(-1, len(factors.gradients), *directions.shape[1:])
        return factors.dot(directions), [(factors.gradients, spread.reshape(-1, *factors.gradients.shape))]
    return _by_autograd(factors, directions)


def stacked(each: list[Tensor]) -> Tensor:
    """`[queries, …]`; a single one is not copied."""
    return each[0][None] if len(each) == 1 else torch.stack(each)


def _dots(moved: Tensor, b: Tensor, layout: Layout) -> Tensor:
    """`[queries, B]`: what each sample's rows of `moved` `[queries, *b.shape]` and b have in common."""
    wide = torch.promote_types(b.dtype, torch.float32)
    return stacked([layout.per_sample_sum(x.to(wide) * b) for x in moved])


def _by_autograd(factors: Factors, directions: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The same of any other use, as far as its inner products can be differentiated."""
    held = {name: x for name, x in _tensors(factors).items() if x.requires_grad}
    scores, slopes = [], []
    with torch.enable_grad():
        own = {name: x.detach().requires_grad_() for name, x in held.items()}
        alike: Any = replace(factors, **own)  # type: ignore[type-var]
        for direction in directions:
            dots = alike.dot(direction[None])
            scores.append(dots.detach()[0])
            slopes.append(torch.autograd.grad(dots.sum(), list(own.values()), allow_unused=True))
    pairs = [
        (x, torch.stack(column))
        for x, column in zip(held.values(), zip(*slopes, strict=True), strict=True)
        if column[0] is not None
    ]
    return torch.stack(scores), pairs


def _tensors(factors: Factors) -> dict[str, Tensor]:
    named = {f.name: getattr(factors, f.name) for f in fields(factors)}  # type: ignore[arg-type]
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}
