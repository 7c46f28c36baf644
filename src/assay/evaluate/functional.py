"""The steps of `torch.optim` as functions of tensors, for many copies of a model at once.

Every operation is elementwise, so that a leading dimension (one copy per removal) passes through, and
differentiable, so that autograd can be held against a formula. The order of operations is that of `torch.optim`.

Source: the algorithms in the documentation of `torch.optim.SGD`, `Adam` and `AdamW`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from assay.errors import UnsupportedOptimizerError

__all__ = ["State", "check_functional", "clip_factor", "step"]

State = Mapping[str, Tensor]
"""A parameter's buffers, named as `torch.optim` names them."""


def check_functional(optimizer: Optimizer) -> None:
    """Refuse by name what `step` does not know.

    Raises:
        UnsupportedOptimizerError: not SGD, Adam or AdamW of `torch.optim`, or AMSGrad.
    """
    known = type(optimizer) in (SGD, Adam, AdamW)
    if not known or any(group.get("amsgrad") for group in optimizer.param_groups):
        name = type(optimizer).__name__ + (" with amsgrad=True" if known else "")
        raise UnsupportedOptimizerError(
            f"{name} has no functional step here: known are torch.optim.SGD, Adam and AdamW without amsgrad"
        )


def step(
    kind: type[Optimizer], group: Mapping[str, Any], lr: float, t: int, w: Tensor, g: Tensor, state: State
) -> tuple[Tensor, State]:
    """One parameter's step number `t`, counted from 1.

    Args:
        kind: the optimizer's class.
        group: its options.
        lr: learning rate of this step.
        t: number of the step.
        w: weights, `[…, *shape]`.
        g: gradient that the optimizer receives, `[…, *shape]`.
        state: buffers before the step; empty at the first.

    Returns:
        The weights and the buffers after the step.

    Example:
        >>> w, _ = step(SGD, {"momentum": 0, "weight_decay": 0.5}, 0.1, 1, torch.ones(2), torch.ones(2), {})
        >>> w
        tensor([0.8500, 0.8500])
    """
    g = -g if group.get("maximize") else g
    if kind is SGD:
        return _sgd(group, lr, t, w, g, state)
    return _adam(group, lr, t, w, g, state, group.get("decoupled_weight_decay", kind is AdamW))


def _sgd(
    group: Mapping[str, Any], lr: float, t: int, w: Tensor, g: Tensor, state: State
) -> tuple[Tensor, State]:
    if group["weight_decay"]:
        g = g + group["weight_decay"] * w
    if not group["momentum"]:
        return w - lr * g, {}
    buffer = g
    if t > 1:
        buffer = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * g
    u = g + group["momentum"] * buffer if group["nesterov"] else buffer
    return w - lr * u, {"momentum_buffer": buffer}


def _adam(
    group: Mapping[str, Any], lr: float, t: int, w: Tensor, g: Tensor, state: State, decoupled: bool
) -> tuple[Tensor, State]:
    beta1, beta2 = group["betas"]
    decay = group["weight_decay"]
    if decay and decoupled:
        w = w * (1 - lr * decay)
    elif decay:
        g = g + decay * w
    m = state["exp_avg"].lerp(g, 1 - beta1) if t > 1 else (1 - beta1) * g
    v = (1 - beta2) * g * g
    if t > 1:
        v = beta2 * state["exp_avg_sq"] + v
    denominator = v.sqrt() / (1 - beta2**t) ** 0.5 + group["eps"]
    return w - (lr / (1 - beta1**t)) * (m / denominator), {"exp_avg": m, "exp_avg_sq": v}


def clip_factor(gradients: Mapping[str, Tensor], largest: float | None, copies: int) -> Tensor:
    """`[copies]`: what `torch.nn.utils.clip_grad_norm_` multiplies each copy's gradient by.

    Args:
        gradients: by name, `[copies, *shape]`.
        largest: the norm that is allowed; None clips nothing.
        copies: how many.
    """
    some = next(iter(gradients.values()))
    if largest is None:
        return some.new_ones(copies)
    norm = torch.stack([g.reshape(copies, -1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    return (largest / (norm + 1e-6)).clamp(max=1.0)
