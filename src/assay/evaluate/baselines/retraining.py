"""Shapley values by training again: the definition, at the price of thousands of trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from assay.evaluate.retraining import tmc_shapley
from assay.evaluate.task import Task

__all__ = ["RetrainingShapley"]


@dataclass(frozen=True)
class RetrainingShapley:
    """Truncated Monte-Carlo Shapley values of the whole training; see `tmc_shapley`.

    Args:
        permutations: orders.
        stride: examples that join together.
        tolerance: where an order ends.
        seed: of the orders.
        cache: folder that keeps what was trained.
    """

    permutations: int = 10
    stride: int = 1
    tolerance: float = 0.01
    seed: int = 0
    cache: str | Path | None = None
    name: str = "retraining Shapley"

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`, in the loss's unit."""
        return tmc_shapley(
            task, self.permutations, stride=self.stride, tolerance=self.tolerance, seed=self.seed,
            cache=self.cache,
        ).values  # fmt: skip
