"""What any method has to beat: chance, and the loss of the example itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.evaluate.task import Task

__all__ = ["FinalLoss", "Given", "Random"]


@dataclass(frozen=True)
class Random:
    """Numbers that know nothing.

    Args:
        seed: of the numbers.
    """

    seed: int = 0
    name: str = "random"

    def scores(self, task: Task) -> Tensor:
        """`[1, N]`, standard normal."""
        return torch.randn(1, task.examples, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class FinalLoss:
    """Minus the loss of the example itself after training: what the model could not learn is held to be harmful."""

    name: str = "low loss"

    @torch.no_grad()
    def scores(self, task: Task) -> Tensor:
        """`[1, N]`, in the loss's unit."""
        model = task.trained.model
        return -torch.cat([task.losses(model, batch) for _, batch in task.batches()])[None]


@dataclass(frozen=True)
class Given:
    """Scores from elsewhere: of a run that was recorded before, or of a rule of one's own.

    Args:
        name: of them.
        values: `[questions, N]` or `[1, N]`.
    """

    name: str
    values: Tensor

    def scores(self, task: Task) -> Tensor:
        """The values."""
        return self.values
