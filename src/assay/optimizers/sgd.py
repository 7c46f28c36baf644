"""Stochastic gradient descent, with heavy-ball or Nesterov momentum."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from assay.optimizers.inputs import Group, State
from assay.optimizers.model import OptimizerModel
from assay.optimizers.scalars import Multiple, Scalar, number, squeezed, widened

__all__ = ["SGD"]


class SGD(OptimizerModel):
    """``torch.optim.SGD``: b_t = μ b_{t−1} + (1 − τ) g_t and u = b_t, with Nesterov u = g_t + μ b_t.

    The first gradient enters the buffer undamped, b_1 = g_1. Source: Sutskever, Martens, Dahl and Hinton,
    ICML 2013, section 2, in the form of the torch documentation.
    """

    preconditioned: ClassVar[bool] = False

    def _linear(
        self, group: Group, state: State, w: Tensor, g: Tensor
    ) -> tuple[Tensor | float, Tensor | Multiple | float]:
        buffer = self._buffer(group, state)
        if buffer is None:
            return _weight(group, age=0, first=True), 0.0
        carry = self._momentum(group) * (self._momentum(group) if group["nesterov"] else 1.0)
        return _weight(group, age=0, first=False), Multiple(carry, widened(buffer))

    def moves(self, param: Tensor) -> tuple[Tensor | Multiple | float, Tensor | Multiple | float]:
        """Return the buffer's and the weights' own tensors, each with its factor."""
        group, grad = self._group(param), param.grad
        plain = grad is not None and grad.layout is torch.strided and not param.is_complex()
        if not plain or any(
            getattr(self.optimizer, name, None) is not None for name in ("grad_scale", "found_inf")
        ):
            return super().moves(param)
        lr, buffer = squeezed(group["lr"]), self._buffer(group, self._state(param))
        gain = _weight(group, age=0, first=buffer is None)
        carry = self._momentum(group) * (self._momentum(group) if group["nesterov"] else 1.0)
        decay, _ = self._weight_decay(group)
        return (
            0.0 if buffer is None else Multiple(lr * carry, widened(buffer)),
            0.0
            if not isinstance(decay, Tensor) and decay == 0
            else Multiple(lr * decay * gain, widened(param.detach())),
        )

    def _foreseen_gain(self, group: Group, state: State) -> Tensor | float:
        return _weight(group, age=0, first=self._buffer(group, state) is None)

    def _momentum(self, group: Group) -> Scalar:
        return number(group["momentum"])

    def _kappa(self, group: Group, t: int, s: int) -> Scalar:
        return _weight(group, age=t - s, first=s == 1)

    def _buffer(self, group: Group, state: State) -> Tensor | None:
        return state.get("momentum_buffer") if group["momentum"] != 0 else None


def _weight(group: Group, age: int, first: bool) -> Scalar:
    """Return ∂u_{s+age}/∂g_s; ``first`` where g_s opened the buffer."""
    mu = number(group["momentum"])
    if mu == 0:
        return float(age == 0)
    in_buffer = mu**age * (1.0 if first else 1.0 - number(group["dampening"]))
    return float(age == 0) + mu * in_buffer if group["nesterov"] else in_buffer
