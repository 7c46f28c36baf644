"""RMSprop, plain or centered, with or without momentum."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from assay.optimizers.inputs import Group, State
from assay.optimizers.model import OptimizerModel
from assay.optimizers.scalars import Scalar, number, second_moment, widened

__all__ = ["RMSprop"]


class RMSprop(OptimizerModel):
    """``torch.optim.RMSprop``: b_t = μ b_{t−1} + g_t / (√ṽ_t + ε) and u = b_t.

    v_t = α v_{t−1} + (1 − α) g_t² and ṽ_t = v_t, or centered ṽ_t = v_t − a_t² with the averaged gradient
    a_t = α a_{t−1} + (1 − α) g_t. Source: Hinton, Neural Networks for Machine Learning, lecture 6e, 2012;
    centered: Graves, arXiv 1308.0850, equations 38 to 45.
    """

    buffer_is_preconditioned: ClassVar[bool] = True

    def _linear(
        self, group: Group, state: State, w: Tensor, g: Tensor
    ) -> tuple[Tensor | float, Tensor | float]:
        alpha = group["alpha"]
        v = second_moment(state.get("square_avg"), g, alpha)
        a = None
        if group["centered"]:
            before = state.get("grad_avg")
            a = torch.lerp(torch.zeros_like(g) if before is None else widened(before), g, 1 - alpha)
        buffer = state.get("momentum_buffer") if group["momentum"] > 0 else None
        carried = 0.0 if buffer is None else group["momentum"] * widened(buffer)
        return _preconditioner(group, v, a), carried

    def _foreseen_gain(self, group: Group, state: State) -> Tensor | None:
        if "square_avg" not in state:
            return None
        a = widened(state["grad_avg"]) if group["centered"] else None
        return _preconditioner(group, widened(state["square_avg"]).clone(), a)

    def _momentum(self, group: Group) -> Scalar:
        return number(group["momentum"])

    def _kappa(self, group: Group, t: int, s: int) -> Scalar:
        return number(group["momentum"]) ** (t - s)


def _preconditioner(group: Group, v: Tensor, a: Tensor | None) -> Tensor:
    """Return 1/(√(v − a²) + ε); overwrites ``v``."""
    if a is not None:
        v.addcmul_(a, a, value=-1)
    return v.sqrt_().add_(group["eps"]).reciprocal_()
