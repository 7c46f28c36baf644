"""Adagrad: a step that shrinks with the sum of squares of all gradients so far."""

from __future__ import annotations

from torch import Tensor

from assay.optimizers.inputs import Group, State
from assay.optimizers.model import OptimizerModel
from assay.optimizers.scalars import number, widened

__all__ = ["Adagrad"]


class Adagrad(OptimizerModel):
    """``torch.optim.Adagrad``: G_t = G_{t−1} + g_t² and u = g_t / ((1 + (t − 1)η)(√G_t + ε)).

    η is the decay of the learning rate. Source: Duchi, Hazan and Singer, JMLR 2011, figure 1 (diagonal).
    """

    def _linear(
        self, group: Group, state: State, w: Tensor, g: Tensor
    ) -> tuple[Tensor | float, Tensor | float]:
        return self._gain(group, state, widened(state["sum"]).addcmul(g, g)), 0.0

    def _foreseen_gain(self, group: Group, state: State) -> Tensor | None:
        # The sum exists from the constructor on. It says nothing as long as no gradient is in it, and where
        # the step count lies on a device (fused), finding out would wait for it.
        steps = number(state["step"])
        is_empty = isinstance(steps, Tensor) or steps == 0
        if is_empty and self.optimizer.defaults["initial_accumulator_value"] == 0:
            return None
        return self._gain(group, state, widened(state["sum"]).clone())

    def _gain(self, group: Group, state: State, total: Tensor) -> Tensor:
        slowed = 1 + number(state["step"]) * group["lr_decay"]
        return total.sqrt_().add_(group["eps"]).mul_(slowed).reciprocal_()
