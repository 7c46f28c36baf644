"""Scores from whole per-sample gradients at finished weights: dot product, cosine, norm, TracIn.

Source of TracIn: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent, NeurIPS 2020, arXiv
2002.08484, section 3.3 (TracInCP): Σ over checkpoints of the learning rate × ⟨∇ℓ(example), ∇ℓ(query)⟩.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils._pytree import tree_map

from assay.evaluate.subsets import pick
from assay.evaluate.task import Checkpoint, Task

__all__ = ["Cosine", "DotProduct", "GradientNorm", "TracIn", "gradients"]

CHUNK = 32  # examples whose gradients are in memory together


def gradients(task: Task, batch: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """`[B, P]`: the gradient of each row's loss with respect to all trained parameters.

    Args:
        task: the model and its losses.
        batch: rows.
        weights: by name; those at the end of training if left out.
    """
    model = task.trained.model
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: b.detach() for name, b in model.named_buffers()}
    if weights is not None:
        own = {name: weights[name] for name in own}
        rest = {name: weights.get(name, b) for name, b in rest.items()}

    def loss(w: dict[str, Tensor], row: Any) -> Tensor:
        one = tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, row)
        found: Tensor = functional_call(_Losses(model, task.losses), _inner({**w, **rest}), (one,))
        return found[0]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for a batch of gradients
        found = vmap(grad(loss), in_dims=(None, 0))(own, batch)
    return torch.cat([found[name].flatten(1) for name in own], 1)


class _Losses(Module):
    """The losses as a module's forward pass, so that every use of a weight sees the weights that are handed in."""

    def __init__(self, model: Module, losses: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.inner, self._losses = model, losses

    def forward(self, batch: Any) -> Tensor:
        return self._losses(self.inner, batch)


def _inner(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"inner.{name}": x for name, x in tensors.items()}


def inner_products(task: Task, at: Checkpoint | None = None, unit: bool = False) -> Tensor:
    """`[questions, N]`: ⟨∇ℓ(query), ∇ℓ(example)⟩, of gradients of length 1 if `unit`.

    Only the queries' gradients and those of a few examples are in memory at a time.
    """
    weights = None if at is None else at.weights
    length: Callable[[Tensor], Tensor] = normalize if unit else lambda x: x
    numbers = torch.split(torch.arange(task.asked), CHUNK)
    asked = torch.cat([length(gradients(task, pick(task.queries, rows), weights)) for rows in numbers])
    asked = task.merged(asked)
    return torch.cat(
        [asked @ length(gradients(task, batch, weights)).t() for _, batch in task.batches(CHUNK)], 1
    )


@dataclass(frozen=True)
class DotProduct:
    """⟨∇ℓ(query), ∇ℓ(example)⟩ at the end of training."""

    name: str = "dot product"

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`."""
        return inner_products(task)


@dataclass(frozen=True)
class Cosine:
    """The cosine of the same two gradients."""

    name: str = "cosine"

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`; for queries that are asked for together, the mean of their cosines."""
        return inner_products(task, unit=True)


@dataclass(frozen=True)
class GradientNorm:
    """Minus the length of the example's own gradient after training: a long one is held to be a mistake."""

    name: str = "small gradient"

    def scores(self, task: Task) -> Tensor:
        """`[1, N]`."""
        return -torch.cat([gradients(task, batch).norm(dim=1) for _, batch in task.batches(CHUNK)])[None]


@dataclass(frozen=True)
class TracIn:
    """Dot products at several checkpoints, each times the learning rate of its time.

    Args:
        checkpoints: how many, evenly spread over those of the training; the last is always among them.
    """

    checkpoints: int = 5
    name: str = "TracIn"

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`; up to the number of steps between two checkpoints, in the loss's unit."""
        found = task.trained.checkpoints
        number = min(self.checkpoints, len(found))
        places = {round(k * len(found) / number) - 1 for k in range(1, number + 1)}
        parts = [found[k].rate * inner_products(task, found[k]) for k in sorted(places)]
        return torch.stack(parts).sum(0)
