"""Adafactor: a second moment factored into rows and columns, and a bound on the size of the update."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from assay.errors import UnsupportedOptimizerError
from assay.optimizers.inputs import Group, State
from assay.optimizers.model import OptimizerModel
from assay.optimizers.scalars import Scalar, next_step, number, squeezed, widened

__all__ = ["Adafactor"]


class Adafactor(OptimizerModel):
    """``torch.optim.Adafactor``: u = (α_t/lr) / max(1, RMS(U_t)/d) · U_t with U_t = g_t/√V̂_t.

    V̂_t = R_t C_t / mean(R_t) with R_t and C_t the averaged row and column means of g², for a vector the
    average itself; α_t = max(ε₂, RMS(w_t)) · min(lr, 1/√t). The clipping by RMS(U_t) counts as part
    of K_t with the value that it takes in this very step, just as the current gradient counts in V̂_t.
    It cannot be foreseen. Source: Shazeer and Stern, ICML 2018, algorithms 4 and 6, in the form of the
    torch documentation.
    """

    elementwise: ClassVar[bool] = False

    def _linear(
        self, group: Group, state: State, w: Tensor, g: Tensor
    ) -> tuple[Tensor | float, Tensor | float]:
        t = next_step(state)
        eps1 = self._eps1(group, w)
        weight: Scalar = t ** group["beta2_decay"]
        precondition = _variance(state, g, weight, eps1).clamp_(min=eps1 * eps1).rsqrt_()
        clipping = _rms(g * precondition).div_(group["d"]).clamp_(min=1.0)
        size = _rms(w).clamp_(min=group["eps"][1]) * _relative_lr(squeezed(group["lr"]), t)
        return precondition.mul_(size / clipping), 0.0

    def _foreseen_gain(self, group: Group, state: State) -> None:
        return None

    def _weight_decay(self, group: Group) -> tuple[Scalar, bool]:
        return number(group["weight_decay"]), True

    def _eps1(self, group: Group, w: Tensor) -> float:
        """Return ε₁; torch takes the default from the dtype of the first parameter that the step visits."""
        if group["eps"][0] is not None:
            return float(group["eps"][0])
        dtypes = [p.dtype for p in group["params"] if p.grad is not None]
        if group["foreach"] and len(set(dtypes)) > 1:
            raise UnsupportedOptimizerError(
                "Adafactor(foreach=True) leaves open which dtype of a group with several gives eps[0]: "
                "set eps[0], or give each dtype a group of its own"
            )
        return torch.finfo(dtypes[0] if dtypes else w.dtype).eps


def _variance(state: State, g: Tensor, weight: Scalar, eps1: float) -> Tensor:
    """Return V̂_t; ``weight`` is that of the current gradient, 1 − β₂ₜ."""
    if g.dim() <= 1:
        return _averaged(state.get("variance"), g.square(), weight)
    rows = _averaged(state.get("row_var"), g.square().mean(-1, keepdim=True), weight)  # [..., n, 1]
    cols = _averaged(state.get("col_var"), g.square().mean(-2, keepdim=True), weight)  # [..., 1, m]
    outer: Tensor = rows @ cols
    return outer.div_(rows.mean(-2, keepdim=True).clamp_(min=eps1))


def _averaged(before: Tensor | None, x: Tensor, weight: Scalar) -> Tensor:
    return x * weight if before is None else widened(before) * (1 - weight) + x * weight


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _relative_lr(lr: Scalar, t: Scalar) -> Scalar:
    """Return min(lr, 1/√t) / lr, 1 at lr = 0."""
    scaled: Scalar = lr * t**0.5
    return scaled.clamp(min=1.0).reciprocal() if isinstance(scaled, Tensor) else 1.0 / max(scaled, 1.0)
