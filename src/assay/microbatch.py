"""One micro-batch: the capture around its forward and backward pass, and what it left for the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.capture import Capture, contract
from assay.capture.check import check_capture
from assay.capture.compiled import CompiledParts
from assay.capture.coverage import Coverage
from assay.capture.fallback import Boundary
from assay.capture.room import Room
from assay.capture.totals import Totals
from assay.capture.weights import Weights
from assay.distributed import OneProcess
from assay.errors import CoverageError, InputError
from assay.faults import Faults
from assay.methods.base import MicroBatch, Retakes, Session
from assay.methods.demands import Demands, Watches
from assay.targets import full_precision

__all__ = ["Watcher", "Watching"]


@dataclass(frozen=True)
class Watching:
    """A micro-batch between its beginning and its end; `boundary` is None where nothing is measured of it."""

    ids: Sequence[int | str]
    weights: Tensor | None
    capture: Capture
    boundary: Boundary | None = None
    watches: Watches | None = None


class Watcher:
    """Puts the capture around every micro-batch of a run.

    Args:
        processes: that train together.
        weights: the parameters that are watched.
        coverage: where their uses are noted.
        faults: what becomes of an error of the capture's own.
        strict: leave torch's own weight gradients untouched.
        check: compare the capture with plain autograd on the first micro-batch, and its totals on the first step.

    Attributes:
        totals_due: whether the totals of the open step, or of the next one, are to be checked.
    """

    def __init__(
        self,
        processes: OneProcess,
        weights: Weights,
        coverage: Coverage,
        faults: Faults,
        *,
        strict: bool,
        check: bool,
    ) -> None:
        self.processes, self.model, self.weights = processes, processes.module, weights
        self.coverage, self.faults, self.strict = coverage, faults, strict
        self.totals_due = check
        self._check_due, self._precision_due = check, True
        self._device = weights.params[0].device
        self._totals: Totals | None = None
        self._sessions: Sequence[Session] = ()
        self._demand = Demands()
        self._compiled = CompiledParts(self.model)
        self._room = Room()

    def begin(self, sessions: Sequence[Session], step: int) -> None:
        """An optimizer step begins: ask the methods what they want of its micro-batches."""
        self._totals = Totals(self.weights, self.processes) if self.totals_due else None
        self._sessions = sessions
        self._demand = Demands()  # the last step's directions go before new ones are made
        self._demand = Demands([session.begin_step(step) for session in sessions])

    def watch(
        self, ids: Sequence[int | str], weights: Tensor | None, inputs: Any, closing: ExitStack
    ) -> Watching:
        """Watch a micro-batch until `closing`.

        Args:
            ids: of its samples.
            weights: `[B]`, what each sample's own loss is multiplied by.
            inputs: tensors whose rows are the samples, beside the model's own inputs.
            closing: ends it.
        """
        self._demand.before()
        capture = self._new_capture(len(ids))
        closing.enter_context(capture.marking())
        first_input = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: self._before_forward(capture, args, kwargs),
            with_kwargs=True,
            prepend=self.processes.sharded,  # the start-up check runs before the parameters are gathered
        )
        closing.callback(first_input.remove)
        watch_closing = closing.enter_context(ExitStack())
        compiled = closing.enter_context(self._compiled.followed(capture))
        if not (self.totals_due or self._demand.measures or compiled):
            return Watching(ids, weights, capture)  # the training runs as it is
        boundary = closing.enter_context(Boundary(self.model, self.weights, capture))
        closing.enter_context(self.processes.watching(capture.carry_over))
        watches = self._demand.watch(capture, watch_closing)
        closing.enter_context(capture)
        for leaf in torch.utils._pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self.weights.outside.expect([leaf], capture.batch)  # the caller says so
                capture.enter(leaf)
        return Watching(ids, weights, capture, boundary, watches)

    def finished(self, watching: Watching) -> list[MicroBatch]:
        """What a micro-batch left for each method, once its backward pass is done.

        Raises:
            InputError: no backward pass happened.
        """
        found = self._finished(watching)
        found.weights = watching.weights
        return self._demand.parts(found, watching.watches)

    def stop(self) -> None:
        """Nothing more is measured."""
        self._totals, self._demand = None, Demands()

    def close(self) -> None:
        """Let go of the memory."""
        self._room.clear()

    def _new_capture(self, batch: int) -> Capture:
        """For the first micro-batch everything is kept, so that its totals can be checked."""
        keep = self.weights.params if self.totals_due else self._demand.keep
        directions = None if self.totals_due else self._demand.directions
        return Capture(
            self.weights,
            batch,
            directions,
            keep=keep,
            rounded=self._demand.rounded and not self.totals_due,
            strict=self.strict,
            faults=self.faults,
            by_token=self._demand.by_token,
            coverage=self.coverage,
            room=self._room,
        )

    def _finished(self, watching: Watching) -> MicroBatch:
        """What a micro-batch left, once its backward pass is done."""
        capture, boundary = watching.capture, watching.boundary
        gradients, kept = self.processes.accumulated(self.weights.params), []
        if boundary is None:
            scores = capture.probe.detach() if gradients else None
        else:
            capture.own_kept(gradients)
            scores, kept = boundary.finish(), capture.release()
        if scores is None:
            unused = boundary is not None and not capture.uses
            reason = "the model was not used" if unused else "no backward pass happened"
            raise InputError(
                f"run.step(ids): {reason} inside; put both the forward pass and loss.backward() in it."
            )
        if boundary is None:
            return MicroBatch(watching.ids, scores)
        self.coverage.check_all_seen()
        if self._totals is not None:
            self._totals.add(kept, scores)
            if self.processes.reduced():
                self._totals.check()
                self._totals, self.totals_due = None, False
            if self._demand.directions is not None:
                scores = contract(kept, self._demand.directions, scores)
            kept = kept if self._demand.keep else []
        return MicroBatch(watching.ids, scores, kept, capture.positions)

    def _before_forward(self, capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        with self.faults.caught("at the model's inputs"):
            self._see_input(capture, args, kwargs)

    def _see_input(self, capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """On each forward pass of the model in a step: the ids match the rows; once, the start-up check."""
        if capture.paused or not torch.is_grad_enabled():
            return
        self._compiled.notice()
        as_targets = self.processes.precision.note(self._device)
        if self._precision_due and not as_targets:
            self._retake(capture)
        self._precision_due = False
        leaves = torch.utils._pytree.tree_leaves((args, dict(kwargs)))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        rows = [x.shape[0] for x in tensors if x.dim()]
        if rows and capture.batch not in rows:
            raise InputError(
                f"run.step(ids): {capture.batch} ids were given, but the model received tensors of "
                f"{', '.join(map(str, dict.fromkeys(rows)))} rows; give one id per row of dimension 0 (AssayCallback "
                "gives one per example; where the trainer makes several rows of each, use assay.Run in a loop of your "
                "own, every id as often as its rows)."
            )
        self.weights.outside.expect(tensors, capture.batch)
        for tensor in tensors:
            capture.enter(tensor)
        if self._check_due and self.processes.all(capture.batch > 1):
            self._check_due = False
            with capture.unseen(), self.processes.aside():
                self.processes.together(lambda: self._start_up_check(args, kwargs, capture.batch))

    def _start_up_check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> None:
        try:
            check_capture(self.model, args, kwargs, self.weights, batch, self.coverage)
        except CoverageError as error:
            error.args = (f"{error}{self.weights.hooked()}",)
            raise

    def _retake(self, capture: Capture) -> None:
        """The first forward pass runs under an autocast that the targets' passes before it knew nothing of."""
        if self.processes.sharded:  # its parameters are being gathered; from the next step on they know
            return
        with capture.unseen(), full_precision(self._device):
            each = zip(self._sessions, self._demand.each, strict=True)
            self._demand = Demands([s.retake() if isinstance(s, Retakes) else d for s, d in each])
        if not self.totals_due:
            capture.directions = self._demand.directions
