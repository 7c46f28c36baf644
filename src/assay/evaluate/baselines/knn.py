"""The exact Shapley values of a nearest-neighbour classifier: no gradient and no training.

With the N examples sorted by their distance from a query, nearest first, and 1[i] = 1 where the i-th has its label,

    s_N = 1[N] max(K, N)⁻¹        s_i = s_{i+1} + (1[i] − 1[i+1]) / K · min(K, i) / i

is the Shapley value of U(S) = (number of the K nearest in S with the query's label) / K.

Source: Jia et al., Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms, VLDB 2019, arXiv 1908.08619,
theorem 1; with fewer than K examples in S dividing by K all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import InputError
from assay.evaluate.baselines.similarity import represent
from assay.evaluate.task import Task

__all__ = ["KNNShapley", "knn_shapley"]


def knn_shapley(
    examples: Tensor, labels: Tensor, queries: Tensor, asked: Tensor, neighbours: int = 5
) -> Tensor:
    """`[Q, N]`: Shapley values of each query's utility.

    Args:
        examples: `[N, d]`.
        labels: `[N]`.
        queries: `[Q, d]`.
        asked: `[Q]`, their labels.
        neighbours: K.

    Example:
        Only the nearest counts: it brings all, and the second what it would bring in its absence.

        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> knn_shapley(x, torch.tensor([1, 0, 1]), torch.zeros(1, 1), torch.tensor([1]), neighbours=1)
        tensor([[ 0.8333, -0.1667,  0.3333]], dtype=torch.float64)
    """
    number = len(examples)
    if not neighbours >= 1:
        raise InputError(f"knn_shapley(neighbours={neighbours}) must be at least 1.")
    order = torch.cdist(queries.double(), examples.double()).argsort(dim=1, stable=True)  # [Q, N]
    same = (labels[order] == asked[:, None]).double()
    place = torch.arange(1, number, dtype=torch.float64)
    steps = (same[:, :-1] - same[:, 1:]) / neighbours * place.clamp(max=neighbours) / place
    last = same[:, -1:] / max(number, neighbours)
    values = torch.cat([steps, last], 1).flip(1).cumsum(1).flip(1)
    return torch.zeros_like(values).scatter_(1, order, values)


@dataclass(frozen=True)
class KNNShapley:
    """KNN-Shapley on raw inputs, or on a representation by the trained model.

    Args:
        neighbours: K.
        features: use `Task.features` in place of the inputs themselves.
    """

    neighbours: int = 5
    features: bool = False

    @property
    def name(self) -> str:
        """With what it looks at, and K where it is not 5."""
        words = ["KNN-Shapley", *(["features"] if self.features else [])]
        return ", ".join([*words, *([] if self.neighbours == 5 else [f"{self.neighbours} neighbours"])])

    def unavailable(self, task: Task) -> str | None:
        """It needs classes."""
        if task.labels is None:
            return "it needs classes, and the task has none"
        return "the task has no features" if self.features and task.features is None else None

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`, in shares of right answers."""
        if task.labels is None:
            raise InputError(f"{self.name} needs classes: give Task(labels=).")
        x, q = (represent(task, data, self.features) for data in (task.data, task.queries))
        return task.merged(knn_shapley(x, task.labels[0], q, task.labels[1], self.neighbours))
