"""What methods are compared on: examples, queries, and a training that can be repeated and watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from assay.errors import InputError
from assay.evaluate.subsets import Losses, SubsetTraining, pick, retrained_losses, seeded
from assay.methods.base import Method
from assay.run import Run
from assay.store import Ledger
from assay.targets import Target
from assay.workers import Workers

__all__ = ["Checkpoint", "Loop", "SubsetLoop", "Task", "Watched"]


@dataclass(frozen=True)
class Checkpoint:
    """The weights at one point of the training.

    Args:
        weights: by name, as in `state_dict`.
        rate: learning rate, the mean over the steps since the checkpoint before.
    """

    weights: dict[str, Tensor]
    rate: float


@dataclass(frozen=True)
class Watched:
    """One training, and what was recorded of it.

    Args:
        model: with the weights at the end.
        optimizer: that trained it.
        batches_of_step: the micro-batches of a step, `(ids, batch)`; ids count the examples from 0.
        loss_fn: `loss_fn(model, batch)`, what was differentiated.
        checkpoints: at the end of each epoch, the last one at the end of training.
        ledger: what assay recorded, where it watched.
    """

    model: Module
    optimizer: Optimizer
    batches_of_step: Callable[[int], Sequence[tuple[Any, Any]]]
    loss_fn: Callable[[Module, Any], Tensor]
    checkpoints: Sequence[Checkpoint]
    ledger: Ledger | None = None

    @property
    def recorded(self) -> Ledger:
        """The ledger.

        Raises:
            InputError: nothing was recorded.
        """
        if self.ledger is None:
            raise InputError("this training was not watched: hand methods= or snapshots= to Loop.train.")
        return self.ledger


class Loop(Protocol):
    """A training that gives the same weights whenever it is repeated."""

    def train(self, methods: Sequence[Method] = (), snapshots: str | int | None = None) -> Watched:
        """Train on everything; assay watches if there is anything to record."""
        ...

    def retrain(
        self,
        kept: Tensor,
        queries: Any,
        measure: Losses,
        *,
        seeds: Sequence[int] = (0,),
        cache: str | Path | None = None,
        workers: Workers | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """`[seeds, S, Q, …]`: train on each subset `[S, N]` of the examples, and measure each query."""
        ...


@dataclass(frozen=True)
class Task:
    """Examples to be valued for queries, and the training that they were used in.

    Args:
        losses: `losses(model, rows)` returns `[B]`, the loss of each row of a piece of `data` or `queries`.
        data: the examples, tensors that share dimension 0.
        queries: the same of what is asked for.
        loop: the training.
        together: one score per example, for the mean loss of all queries, in place of one for each query.
        groups: `[Q]`, the group of each query, from 0: one score per example for the mean loss of each group.
        features: `features(model, rows)`, `[B, d]`: a representation.
        labels: of the examples and of the queries, `[N]` and `[Q]`, where they have classes.
        texts: of the examples and of the queries, where they are texts.
        outputs: name of the module whose output are the logits, where it is not the model itself.
        name: of the task.

    Example:
        >>> x, y = torch.randn(12, 3), torch.randint(2, (12,))
        >>> def losses(model, rows):
        ...     return torch.nn.functional.cross_entropy(model(rows[0]), rows[1], reduction="none")
        >>> training = SubsetTraining(lambda params: torch.optim.SGD(params, lr=0.1), epochs=2, batch=4)
        >>> loop = SubsetLoop(lambda: torch.nn.Linear(3, 2), losses, (x, y), training)
        >>> task = Task(losses, (x, y), (x[:5], y[:5]), loop)
        >>> task.examples, task.asked, len(task.trained.checkpoints)
        (12, 5, 2)
    """

    losses: Losses
    data: Any
    queries: Any
    loop: Loop
    together: bool = False
    groups: Sequence[int] | None = None
    features: Callable[[Module, Any], Tensor] | None = None
    labels: tuple[Tensor, Tensor] | None = None
    texts: tuple[Sequence[str], Sequence[str]] | None = None
    outputs: str | None = None
    name: str = "task"

    @property
    def examples(self) -> int:
        """N."""
        return rows_in(self.data)

    @property
    def asked(self) -> int:
        """How many queries there are."""
        return rows_in(self.queries)

    @property
    def questions(self) -> list[list[int]]:
        """The queries that are asked for together: each by itself, by group, or all of them."""
        if self.groups is None:
            return [list(range(self.asked))] if self.together else [[i] for i in range(self.asked)]
        return [[i for i, own in enumerate(self.groups) if own == g] for g in range(max(self.groups) + 1)]

    @cached_property
    def trained(self) -> Watched:
        """One training that nothing watched."""
        return self.loop.train()

    def loss_fn(self, model: Module, batch: Any) -> Tensor:
        """The mean loss of a batch."""
        return self.losses(model, batch).mean()

    def question_batches(self) -> list[Any]:
        """A batch of queries for each question."""
        return [pick(self.queries, torch.tensor(rows)) for rows in self.questions]

    def targets(self) -> dict[str, Target]:
        """The same as targets of a run."""
        return {str(i): Target([batch], self.loss_fn) for i, batch in enumerate(self.question_batches())}

    def merged(self, scores: Tensor) -> Tensor:
        """`[questions, N]` of `[Q, N]`: the mean over the queries of each question."""
        if len(scores) != self.asked:
            return scores
        return torch.stack([scores[rows].mean(0) for rows in self.questions])

    def batches(self, size: int = 100) -> list[tuple[list[int], Any]]:
        """The examples in order, with their numbers."""
        return [
            (rows.tolist(), pick(self.data, rows)) for rows in torch.split(torch.arange(self.examples), size)
        ]


class SubsetLoop:
    """The training of `assay.evaluate.subsets`: a new model, some epochs, batches in the order that a seed gives.

    Args:
        make_model: gives a new model.
        losses: `losses(model, rows)` returns `[B]`.
        data: the examples.
        training: the settings.
        seed: of the weights and of the order.
        at_once: models that are retrained side by side.
    """

    def __init__(
        self,
        make_model: Callable[[], Module],
        losses: Losses,
        data: Any,
        training: SubsetTraining,
        seed: int = 0,
        at_once: int = 32,
    ) -> None:
        self.make_model, self.losses, self.data = make_model, losses, data
        self.training, self.seed, self.at_once = training, seed, at_once

    def train(self, methods: Sequence[Method] = (), snapshots: str | int | None = None) -> Watched:
        """See `Loop.train`; the same weights as `train_on_subsets` gives with everything kept."""
        examples, training = rows_in(self.data), self.training
        with seeded(self.seed):
            model = self.make_model()
            orders = [torch.randperm(examples) for _ in range(training.epochs)]
        steps = [rows for order in orders for rows in torch.split(order, training.batch)]
        optimizer = training.optimizer(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: training.rate(t, examples))
        run = Run(model, optimizer, methods=methods, snapshots=snapshots) if methods or snapshots else None
        checkpoints, rates = [], list[float]()
        for t, rows in enumerate(steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            if run is None:
                self._loss(model, pick(self.data, rows)).backward()  # type: ignore[no-untyped-call]
            else:
                with run.step(rows.tolist()):
                    self._loss(model, pick(self.data, rows)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if (t + 1) % (len(steps) // training.epochs) == 0:
                checkpoints.append(checkpoint(model, rates))
                rates = []
        if run is not None:
            run.close()
        model.eval()
        return Watched(
            model, optimizer, lambda t: [(steps[t].tolist(), pick(self.data, steps[t]))], self._loss,
            checkpoints, None if run is None else run.ledger,
        )  # fmt: skip

    def _loss(self, model: Module, batch: Any) -> Tensor:
        return self.losses(model, batch).mean()

    def retrain(
        self,
        kept: Tensor,
        queries: Any,
        measure: Losses,
        *,
        seeds: Sequence[int] = (0,),
        cache: str | Path | None = None,
        workers: Workers | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """See `Loop.retrain`."""
        return retrained_losses(
            self.make_model, self.losses, self.data, queries, self.training, kept=kept, seeds=seeds,
            measure=measure, cache=cache, at_once=self.at_once, progress=progress, workers=workers,
        )  # fmt: skip


def checkpoint(model: Module, rates: Sequence[float]) -> Checkpoint:
    """The weights as they are now, after steps of these learning rates."""
    weights = {name: w.detach().clone() for name, w in model.state_dict().items()}
    return Checkpoint(weights, sum(rates) / max(1, len(rates)))


def rows_in(data: Any) -> int:
    """The length of dimension 0 that all tensors share.

    Raises:
        InputError: they do not.
    """
    lengths = {len(x) for x in tree_leaves(data) if isinstance(x, Tensor)}
    if len(lengths) != 1:
        raise InputError(f"data: its tensors have {sorted(lengths)} rows; they must share dimension 0.")
    return lengths.pop()
