"""The run again, segment by segment: from a snapshot to the next, with what each step's adjoint needs put aside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from assay.errors import InputError
from assay.optimizers import unwrapped
from assay.replay.check import Check
from assay.replay.clipping import Clipping
from assay.replay.flat import Flat, Span
from assay.replay.gradient import Taken
from assay.replay.graphs import Graphs
from assay.replay.optimizers import OptimizerAdjoint
from assay.replay.trajectory import StepRecord, Trajectory
from assay.snapshots import norm_of, random_state, same_random_state, set_random_state

__all__ = ["Batches", "Forward", "Loss", "MicroBatches", "Stash"]

MicroBatches = Sequence[tuple[Sequence[int | str], Any]]
Batches = Callable[[int], MicroBatches]
Loss = Callable[[Module, Any], Tensor]


@dataclass
class Stash:
    """One step, as its adjoint needs it.

    Args:
        record: what the run logged of it.
        batches: its micro-batches.
        share: by which each micro-batch's loss counts in the gradient.
        weights: `[P]` before the step.
        buffers: of the optimizer, `[P]` each, before the step.
        gradient: `[P]`, before clipping; empty where nothing reads it.
        norm: of it.
        losses: `[micro-batches]`.
        spans: how the step treats the entries.
        taken: the micro-batches' gradients with their graphs, where they are kept.
    """

    record: StepRecord
    batches: MicroBatches
    share: float
    weights: Tensor
    buffers: dict[str, Tensor]
    gradient: Tensor
    norm: float
    losses: Tensor
    spans: list[Span]
    taken: list[Taken]


class Forward:
    """Replays segments with the user's own model and optimizer.

    Args:
        model: of the run's architecture; its weights are overwritten.
        optimizer: of the run's kind, over the model's parameters.
        trajectory: what the run left.
        batches_of_step: from a step's number to its micro-batches, `(ids, batch)` each.
        loss_fn: the loss that was differentiated.
        clipping: what the loop did to the gradient.
        adjoint: of the optimizer, which says what is to be put aside.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        trajectory: Trajectory,
        batches_of_step: Batches,
        loss_fn: Loss,
        clipping: Clipping,
        adjoint: OptimizerAdjoint,
    ) -> None:
        self.model, self.optimizer, self.trajectory = model, unwrapped(optimizer), trajectory
        self.batches_of_step, self.loss_fn = batches_of_step, loss_fn
        self.clipping, self.adjoint = clipping, adjoint
        self.flat = Flat(model, self.optimizer)
        self.check = Check(self.flat)
        self._restored: tuple[int, Tensor] | None = None  # the last snapshot's step and weights
        self._divided = False  # whether the loop divided the loss by the number of micro-batches

    def restore(self, step: int) -> Tensor:
        """Put model and optimizer into the state of a snapshot; the weights `[P]`.

        Raises:
            InputError: the model or the optimizer is not the run's.
        """
        content = self.trajectory.load(step)
        modules = list(self.model.modules())
        with torch.no_grad():
            _fill(dict(self.model.named_parameters()), content["weights"], "parameters")
            _fill(dict(self.model.named_buffers()), content["buffers"], "buffers")
        for module, training in zip(modules, content["training"], strict=True):
            module.training = training
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise InputError(
                f"the optimizer does not take the run's state ({error}): make it with the run's parameter groups."
            ) from error
        self.optimizer.zero_grad()
        self._restored = step, self.flat.weights()
        return self._restored[1]

    def segment(
        self, start: int, stop: int, keep: bool = True, graphs: Graphs | None = None
    ) -> Iterator[Stash | None]:
        """Replay the steps from a snapshot to the next, and compare the end with it.

        Args:
            start: step of a snapshot.
            stop: step of the next one.
            keep: whether to put aside what the adjoint needs.
            graphs: says which steps' gradients keep their graphs.

        Yields:
            One stash per step that was taken, or None if nothing is kept.

        Raises:
            InputError: the replay is not the run.
        """
        expected = self._weights_at(stop)
        begin = self.restore(start)
        self.check.begin(start)
        records = [self.trajectory.records[t] for t in range(start, stop)]
        taken = [record for record in records if not record.skipped]
        if graphs is not None:
            graphs.begin(taken)
        for record in taken:
            yield self.step(record, keep, graphs=graphs)
        self.check.weights(stop, begin, self.flat.weights(), expected)

    def _weights_at(self, step: int) -> Tensor:
        """`[P]`, of a snapshot: on the way back, the one that the segment before began with."""
        if self._restored is not None and self._restored[0] == step:
            return self._restored[1]
        weights = self.trajectory.load(step)["weights"]
        return self.flat.join(
            [weights[name].to(p.device) for name, p in zip(self.flat.names, self.flat.params, strict=True)]
        )

    def step(
        self,
        record: StepRecord,
        keep: bool,
        factors: Sequence[float] | None = None,
        graphs: Graphs | None = None,
    ) -> Stash | None:
        """Take one step.

        Args:
            record: the log of it.
            keep: whether to put aside what the adjoint needs.
            factors: of each micro-batch's loss; given, the step is meant to differ and is not compared.
            graphs: says whether its gradients keep their graphs.
        """
        batches = self.batches_of(record)
        self.optimizer.zero_grad()
        drew, losses = False, []
        taken: list[Taken] = []
        kept = graphs is not None and graphs.wants(record.step)
        for m, (ids, batch) in enumerate(batches):
            if kept:
                assert graphs is not None
                taken.append(graphs.curvature.keep(batch, len(ids), record.random[m]))
                taken[-1].accumulate(self.flat)
                losses.append(taken[-1].loss)
            else:
                set_random_state(record.random[m])
                loss = self.loss_fn(self.model, batch)
                (loss if factors is None else factors[m] * loss).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            drew = drew or not same_random_state(record.random[m], random_state(self.model))
        if graphs is not None:
            graphs.note(taken)
        self._set_options(record)
        norm = float(_norm(self.flat))
        if factors is not None:
            share = 1 / len(batches) if self._divided else 1.0
        else:
            share = self.check.share(record, norm, drew)
            self._divided = share != 1
        if share != 1:
            torch._foreach_mul_([p.grad for p in self.flat.params if p.grad is not None], share)
            norm *= share
        stash = self._stash(record, batches, share, norm, torch.stack(losses), taken) if keep else None
        gradients = [p.grad for p in self.flat.params if p.grad is not None]
        if self.clipping.factor != 1:
            torch._foreach_mul_(gradients, self.clipping.factor)
        if self.clipping.largest is not None:
            clip_grad_norm_(self.flat.params, self.clipping.largest)
        if factors is None:
            self.check.received(record, norm * abs(self.clipping.scale(norm)), drew)
        self.optimizer.step()
        return stash

    def batches_of(self, record: StepRecord) -> MicroBatches:
        """The step's micro-batches, their ids compared with the run's.

        Raises:
            InputError: they are others.
        """
        batches = list(self.batches_of_step(record.step))
        self.check.ids(record, batches)
        return batches

    def _stash(
        self,
        record: StepRecord,
        batches: MicroBatches,
        share: float,
        norm: float,
        losses: Tensor,
        taken: list[Taken],
    ) -> Stash:
        reads = self.adjoint.reads_gradient or self.clipping.largest is not None
        gradient = self.flat.gradients() if reads else losses.new_zeros(0)
        buffers = {name: self.flat.buffer(name) for name in self.adjoint.reads}
        return Stash(
            record,
            batches,
            share,
            self.flat.weights(),
            buffers,
            gradient,
            norm,
            losses,
            self.flat.spans(),
            taken,
        )

    def _set_options(self, record: StepRecord) -> None:
        for group, options in zip(self.optimizer.param_groups, record.groups, strict=True):
            for name, value in options.items():
                if isinstance(group.get(name), Tensor):
                    group[name].fill_(value)
                else:
                    group[name] = value

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Model, optimizer and generators are as they were afterwards."""
        random = random_state(self.model)
        modes = [module.training for module in self.model.modules()]
        gradients = [p.grad for p in self.flat.params]
        state = copy.deepcopy(self.optimizer.state_dict())
        tensors = [*self.model.parameters(), *self.model.buffers()]
        values = [x.detach().clone() for x in tensors]
        for p in self.flat.params:
            p.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for x, value in zip(tensors, values, strict=True):
                    x.copy_(value)
            self.optimizer.load_state_dict(state)
            for module, mode in zip(self.model.modules(), modes, strict=True):
                module.training = mode
            for p, gradient in zip(self.flat.params, gradients, strict=True):
                p.grad = gradient
            set_random_state(random)


def _fill(own: dict[str, Any], stored: dict[str, Tensor], what: str) -> None:
    different = sorted(set(own) ^ set(stored)) or [n for n, x in own.items() if x.shape != stored[n].shape]
    if different:
        raise InputError(
            f"the model's {what} are not the run's ({different[0]!r} differs): pass the architecture that was trained."
        )
    for name, x in own.items():
        x.copy_(stored[name])


def _norm(flat: Flat) -> Tensor:
    gradients = [p.grad for p in flat.params if p.grad is not None]
    return norm_of(gradients) if gradients else flat.params[0].detach().new_zeros(())
