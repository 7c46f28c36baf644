"""Plain gradient descent in place of an optimizer whose own step has no linear model."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from assay.optimizers.inputs import Group, State
from assay.optimizers.model import OptimizerModel
from assay.optimizers.scalars import Scalar

__all__ = ["GradientDescent"]


class GradientDescent(OptimizerModel):
    """K = lr, whatever the optimizer does: the explicit opt-in ``optimizer_model="sgd"``.

    The identity of :class:`~assay.optimizers.Split` does not hold; what the update does beyond lr·grad
    shows as residual in the account.
    """

    preconditioned: ClassVar[bool] = False

    def _linear(
        self, group: Group, state: State, w: Tensor, g: Tensor
    ) -> tuple[Tensor | float, Tensor | float]:
        return 1.0, 0.0

    def _foreseen_gain(self, group: Group, state: State) -> float:
        return 1.0

    def _weight_decay(self, group: Group) -> tuple[Scalar, bool]:
        return 0.0, False
