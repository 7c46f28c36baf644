"""What the adjoint of an optimizer's step answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["WEIGHTS", "OptimizerAdjoint", "Vectors"]

Vectors = dict[str, Tensor]
"""A stretch of the optimizer's state, flattened: the weights under `WEIGHTS`, buffers under their own names."""

WEIGHTS = "weights"


class OptimizerAdjoint(ABC):
    """Carries the adjoint of (weights, buffers) from behind one step to before it.

    The adjoint λ of a quantity x is the derivative of the queries' losses at the end of training with respect to x.

    Attributes:
        buffers: the optimizer's buffers that carry an adjoint, by their names in `optimizer.state`.
        reads: those of them whose value before the step the formulas need.
        reads_gradient: whether they need the gradient that the step received.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    reads_gradient: ClassVar[bool] = False

    @abstractmethod
    def pull(
        self, options: Mapping[str, Any], count: int, before: Vectors, g: Tensor, adjoints: Vectors
    ) -> Tensor:
        """One step backwards, the gradient's own dependence on the weights left out.

        Args:
            options: the parameter group's, as they were at the step.
            count: number of the step in the optimizer's own count, from 1.
            before: weights and the buffers of `reads`, `[n]`, before the step.
            g: gradient that the step received, `[n]`.
            adjoints: of the weights and of `buffers`, `[queries, n]`: those behind the step, which become those
                before it in their place.

        Returns:
            λ_g, the adjoint of the gradient, `[queries, n]`.
        """
