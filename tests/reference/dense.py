"""In-run values by the definition: one backward pass per sample, dense gradients, optimizer formulas by hand.

A sample's value in a step is Σ_p ⟨∇ℓ_p(w), K_p ⊙ c·g_p⟩ over the parameters p, with ℓ the target's loss, g
the sample's part of the training gradient, c what the loop did to the gradient after the backward pass, and K
the factor by which the optimizer turns a gradient into a (negative) change of the weights in the same step.
Nothing here is taken from assay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from reference.cases import Batch, Loss

Id = int | str
MicroBatch = tuple[Sequence[Id], Batch]

Step = list[tuple[Id, float]]
"""Id and value of every sample of an optimizer step, in the order of the micro-batches and their rows."""


@dataclass(frozen=True)
class Snapshot:
    """What a step starts from, in float64.

    Args:
        model: before the step.
        optimizer: of that model, as it is when its `step` is called.
        micro_batches: the step's data.
        received: the gradient that `step` is called with, per parameter of the optimizer; Adam's second
            moment is the user's own, whatever rounding made of the gradient in it.
    """

    model: nn.Module
    optimizer: Optimizer
    micro_batches: Sequence[MicroBatch]
    received: Sequence[Tensor]


@dataclass(frozen=True)
class Target:
    """A validation objective: the mean of `loss` over `batches`, the model in evaluation mode."""

    batches: Sequence[Batch]
    loss: Loss


def values(
    snapshots: Sequence[Snapshot],
    loss: Loss,
    targets: Mapping[str, Target],
    *,
    clip: float | None = None,
    tolerance: float = 1e-9,
) -> dict[str, list[Step]]:
    """The values by target and step.

    The loss of each of a step's n micro-batches is divided by n, as users do; the gradient is clipped to the
    norm `clip`.
    """
    result: dict[str, list[Step]] = {name: [] for name in targets}
    for snapshot in snapshots:
        owned = [p for group in snapshot.optimizer.param_groups for p in group["params"]]
        received = {p: g for p, g in zip(owned, snapshot.received, strict=True) if p.requires_grad}
        params = list(received)
        samples = _sample_gradients(snapshot, loss, params)
        total = [torch.stack(parts).sum(0) for parts in zip(*(g for _, g in samples), strict=True)]
        c = clip_factor(total, clip)
        _add_up([c * g for g in total], list(received.values()), tolerance)
        K = [factor(snapshot.optimizer, p, g) for p, g in received.items()]
        for name, target in targets.items():
            direction = target_gradient(snapshot.model, target, params)
            scaled = [c * k * d for k, d in zip(K, direction, strict=True)]
            result[name].append([(i, _inner_product(scaled, gradient)) for i, gradient in samples])
    return result


def _sample_gradients(
    snapshot: Snapshot, loss: Loss, params: list[nn.Parameter]
) -> list[tuple[Id, list[Tensor]]]:
    """Each sample's id and its gradient, one backward pass each."""
    result: list[tuple[Id, list[Tensor]]] = []
    for ids, batch in snapshot.micro_batches:
        for i, sample in enumerate(ids):
            term = loss.part(snapshot.model, batch, i) / len(snapshot.micro_batches)
            result.append((sample, _gradient(term, params)))
    return result


def target_gradient(model: nn.Module, target: Target, params: list[nn.Parameter]) -> list[Tensor]:
    """∇ℓ of the target, one tensor per parameter."""
    model.eval()
    mean = torch.stack([target.loss(model, batch) for batch in target.batches]).mean()
    gradient = _gradient(mean, params)
    model.train()
    return gradient


def _gradient(value: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True))


def _inner_product(a: list[Tensor], b: list[Tensor]) -> float:
    return float(torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum())


def _add_up(total: list[Tensor], received: list[Tensor], tolerance: float) -> None:
    """The parts must add up to the gradient that the optimizer received, or they are not its parts."""
    found, truth = (torch.cat([g.flatten() for g in gradient]) for gradient in (total, received))
    error, size = (found - truth).abs().max(), truth.abs().max()
    assert error <= tolerance * size, f"the parts miss the gradient by {error:.1e} of {size:.1e}"


def clip_factor(gradient: list[Tensor], max_norm: float | None) -> float:
    """What `clip_grad_norm_` multiplies the gradient by."""
    if max_norm is None:
        return 1.0
    norm = float(torch.cat([g.flatten() for g in gradient]).norm())
    return min(1.0, max_norm / (norm + 1e-6))


def factor(optimizer: Optimizer, param: nn.Parameter, gradient: Tensor) -> Tensor:
    """K: minus the derivative of the step's weight change by the gradient, the moments of the step held.

    Args:
        optimizer: in its state before the step.
        param: the parameter that it updates.
        gradient: of that parameter, as the step receives it.

    Returns:
        A tensor that broadcasts against the parameter.
    """
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    state = optimizer.state[param]
    lr = torch.as_tensor(group["lr"], dtype=torch.float64)
    if group.get("maximize"):
        lr = -lr
    if isinstance(optimizer, SGD):
        return lr * _sgd(group, first=state.get("momentum_buffer") is None)
    assert isinstance(optimizer, Adam)  # AdamW is one
    return lr * _adam(group, state, gradient, param, decoupled=isinstance(optimizer, AdamW))


def _sgd(group: dict[str, Any], first: bool) -> float:
    """Momentum buffer b ← μ b + (1 − dampening) g, which starts as g itself; Nesterov moves by g + μ b."""
    momentum = float(group["momentum"])
    if momentum == 0.0:
        return 1.0
    enters = 1.0 if first else 1.0 - float(group["dampening"])
    return 1.0 + momentum * enters if group["nesterov"] else enters


def _adam(
    group: dict[str, Any], state: dict[str, Any], gradient: Tensor, param: Tensor, decoupled: bool
) -> Tensor:
    """(1 − β1)/(1 − β1^t) / (√v̂ + ε), the step's own gradient in v; Kingma & Ba (2015), algorithm 1."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    t = int(state["step"]) + 1 if "step" in state else 1
    g = -gradient if group["maximize"] else gradient
    if not decoupled:
        g = g + group["weight_decay"] * param.detach()
    v = (1 - beta2) * g**2
    if t > 1:
        v = v + beta2 * state["exp_avg_sq"]
        if group["amsgrad"]:
            v = torch.maximum(v, state["max_exp_avg_sq"])
    second: Tensor = (v / (1 - beta2**t)).sqrt()
    return (1 - beta1) / (1 - beta1**t) / (second + float(group["eps"]))
