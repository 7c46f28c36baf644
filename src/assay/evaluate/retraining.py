"""Answers by training again: one example left out, the best ones left out, and Shapley values of the whole training.

Every function here trains each model as if it had only its own examples (`assay.evaluate.subsets`), keeps what it has
trained in `cache=`, and goes on there when it was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from assay.errors import InputError
from assay.evaluate.task import Task
from assay.workers import Workers

__all__ = ["Brittleness", "Retraining", "RetrainingValues", "brittleness", "leave_one_out", "tmc_shapley"]

Progress = Callable[[int, int], None]


class Retraining(TypedDict, total=False):
    """How models are trained again.

    Attributes:
        seeds: of the retrainings; effects are averaged over them.
        cache: folder that keeps what was trained.
        workers: processes that train, `assay.workers.Local(2)`.
        progress: called with the number of models done and of all.
    """

    seeds: Sequence[int]
    cache: str | Path | None
    workers: Workers | None
    progress: Progress | None


def _below(options: Retraining, name: str) -> Retraining:
    """The same with a folder of its own in the cache."""
    cache = options.get("cache")
    return options if cache is None else {**options, "cache": f"{cache}/{name}"}


def leave_one_out(task: Task, removed: Sequence[int], **options: Unpack[Retraining]) -> Tensor:
    """`[questions, removed]`: by how much each query's loss is higher when trained without the example.

    Costs one training for each example and one with everything, times the seeds.

    Args:
        task: examples, queries and training.
        removed: examples, by number.
        options: see `Retraining`.

    Returns:
        In the loss's unit, positive where the example had lowered the loss, averaged over the seeds.

    Raises:
        InputError: there is no such example.

    Example:
        >>> from assay.evaluate.subsets import SubsetTraining
        >>> from assay.evaluate.task import SubsetLoop
        >>> data = torch.tensor([[1.0], [2.0], [6.0]])
        >>> def losses(model, rows):
        ...     return (model(torch.ones(1, 1)) - rows).square()[:, 0]
        >>> def zero():
        ...     model = torch.nn.Linear(1, 1, bias=False)
        ...     torch.nn.init.zeros_(model.weight)
        ...     return model
        >>> training = SubsetTraining(lambda p: torch.optim.SGD(p, lr=0.5), epochs=1, batch=3, decay=False)
        >>> task = Task(losses, data, torch.tensor([[3.0]]), SubsetLoop(zero, losses, data, training))
        >>> leave_one_out(task, [0, 2])  # the mean is 3, without the first 4, without the last 1.5
        tensor([[1.0000, 2.2500]], dtype=torch.float64)
    """
    outside = [i for i in removed if not 0 <= i < task.examples]
    if outside:
        raise InputError(f"leave_one_out: there is no example {outside[0]} among {task.examples}.")
    kept = torch.ones(len(removed) + 1, task.examples, dtype=torch.bool)
    kept[torch.arange(1, len(kept)), torch.tensor(list(removed))] = False
    found = task.loop.retrain(kept, task.queries, task.losses, **options).mean(0)  # [removed + 1, Q]
    return task.merged((found[1:] - found[0]).t())


@dataclass(frozen=True)
class Brittleness:
    """What became of each query when its best examples were taken away.

    Args:
        counts: how many examples were taken away.
        rise: `[counts, Q]`, by how much the query's loss rose, averaged over the seeds.
        flipped: `[counts, Q]`, the share of seeds in which its prediction turned from right to wrong, among those in
            which it was right with everything; NaN where it never was, or no prediction was asked for.
    """

    counts: tuple[int, ...]
    rise: Tensor
    flipped: Tensor


def brittleness(
    task: Task,
    scores: Tensor,
    counts: Sequence[int],
    correct: Callable[[object, object], Tensor] | None = None,
    **options: Unpack[Retraining],
) -> Brittleness:
    """Take away the examples that a method holds to be the best for a query, train again, and look at the query.

    Costs one training for each query and count, or only for each count where the scores are the same for all queries,
    and one with everything, times the seeds.

    Args:
        task: examples, queries and training.
        scores: `[Q, N]`, or `[1, N]`.
        counts: how many examples are taken away.
        correct: `correct(model, rows)`, `[B]`, 1 where the prediction is right; without it nothing is said of flips.
        options: see `Retraining`.

    Raises:
        InputError: a count that leaves nothing, or scores of another shape.

    Source: Ilyas et al., Datamodels, ICML 2022, arXiv 2202.00622, section 4.1 (data support); TRAK, arXiv 2303.14186,
    section 4.3.
    """
    if scores.shape[1] != task.examples or len(scores) not in (1, task.asked):
        raise InputError(
            f"brittleness: scores of shape {list(scores.shape)}; give [{task.asked}, {task.examples}] or "
            f"[1, {task.examples}]."
        )
    if not counts or not all(0 < count < task.examples for count in counts):
        raise InputError(f"brittleness(counts={list(counts)}): give numbers from 1 to {task.examples - 1}.")
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = torch.ones(len(counts) * len(scores) + 1, task.examples, dtype=torch.bool)
    for c, count in enumerate(counts):
        for q in range(len(scores)):
            kept[1 + c * len(scores) + q, order[q, :count]] = False
    found = task.loop.retrain(kept, task.queries, _Both(task, correct), **options)  # [seeds, 1 + S, Q, 2]
    own = torch.arange(task.asked)
    each = found[:, 1:].reshape(
        len(found), len(counts), len(scores), *found.shape[2:]
    )  # [seeds, counts, Q or 1, Q, 2]
    after = each[:, :, own if len(scores) > 1 else torch.zeros_like(own), own]  # [seeds, counts, Q, 2]
    before = found[:, :1]
    rise = (after[..., 0] - before[..., 0]).mean(0)
    was, still = before[..., 1] > 0.5, after[..., 1] > 0.5
    flipped = (was & ~still).sum(0).double() / was.sum(0).double()  # 0 / 0 = NaN
    return Brittleness(tuple(counts), rise, torch.full_like(rise, torch.nan) if correct is None else flipped)


class _Both:
    """Loss and rightness of each row, `[B, 2]`; a class of the module, so that other processes can be given it."""

    def __init__(self, task: Task, correct: Callable[[object, object], Tensor] | None) -> None:
        self.losses, self.correct = task.losses, correct

    def __call__(self, model: object, rows: object) -> Tensor:
        losses = self.losses(model, rows)
        right = torch.zeros_like(losses) if self.correct is None else self.correct(model, rows)
        return torch.stack([losses, right.to(losses.dtype)], 1)


@dataclass(frozen=True)
class RetrainingValues:
    """Shapley values of the whole training.

    Args:
        values: `[questions, N]`, in the loss's unit.
        errors: `[questions, N]`, their standard errors over the orders.
        trainings: how many models were trained.
    """

    values: Tensor
    errors: Tensor
    trainings: int


def tmc_shapley(
    task: Task,
    permutations: int = 10,
    *,
    stride: int = 1,
    tolerance: float = 0.01,
    seed: int = 0,
    **options: Unpack[Retraining],
) -> RetrainingValues:
    """Monte-Carlo Shapley values of U(S) = minus the loss after training on S alone, with truncated orders.

    Along a random order of the examples, `stride` of them join at a time and share the gain. What comes after a prefix
    that is as good as everything gets nothing. Costs at most N / stride trainings for each order and seed.

    Args:
        task: examples, queries and training.
        permutations: orders.
        stride: examples that join together.
        tolerance: an order ends where |U(all) − U(S)| falls below this share of |U(all) − U(∅)|, on the mean over the
            queries; 0 truncates nothing.
        seed: of the orders.
        options: see `Retraining`.

    Raises:
        InputError: fewer than two orders, or a stride below 1.

    Source: Ghorbani and Zou, Data Shapley, ICML 2019, arXiv 1904.02868, algorithm 1.
    """
    if permutations < 2 or stride < 1:
        raise InputError(
            f"tmc_shapley(permutations={permutations}, stride={stride}): give at least 2 orders, and a stride of at "
            "least 1."
        )
    number = task.examples
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(number, generator=generator) for _ in range(permutations)])
    place = orders.argsort(1)  # [permutations, N]: when each example joins
    sizes = [*range(stride, number, stride), number]

    def worth(kept: Tensor, name: str) -> Tensor:
        found = task.loop.retrain(kept, task.queries, task.losses, **_below(options, name)).mean(0)
        return task.merged(-found.t()).t()  # [S, questions]

    nothing, everything = worth(
        torch.stack([torch.zeros(number, dtype=torch.bool), torch.ones(number, dtype=torch.bool)]), "ends"
    )
    near = tolerance * float((everything - nothing).mean().abs())
    values = torch.zeros(permutations, len(everything), number, dtype=torch.float64)
    before = nothing.expand(permutations, -1).clone()
    open_ = torch.ones(permutations, dtype=torch.bool)
    trainings, start = 2, 0
    for size in sizes:
        open_ &= ((everything - before).mean(1).abs() >= near) if tolerance else open_
        if not bool(open_.any()):
            break
        after = everything.expand(int(open_.sum()), -1)
        if size < number:
            after = worth(place[open_] < size, f"size-{size:06d}")
            trainings += len(after)
        gain = (after - before[open_]) / (size - start)  # [open, questions]
        joined = ((place[open_] >= start) & (place[open_] < size)).double()  # [open, N]
        values[open_] += gain[:, :, None] * joined[:, None]
        before[open_] = after
        start = size
    return RetrainingValues(values.mean(0), values.std(0) / permutations**0.5, trainings)
