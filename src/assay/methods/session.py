"""`InRunShapley` at work: which gradient of the target values which step, and when it is there.

| path | what the backward pass is asked for | values are formed |
|---|---|---|
| left, K known before the step (SGD), momentum instant | inner products with K ∇ℓ(w_t) | in the backward pass |
| left, hessian | the per-sample gradients | before the optimizer's step |
| trapezoid, simpson | the per-sample gradients | when ∇ℓ(w_{t+1}) is there: at the next step's beginning |

With memory="recompute" it is asked for nothing, and forward and backward pass are taken again where the gradients would
be contracted (`capture.recompute`); with memory="reduced" the values of the left end come first (`correction`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from assay.capture.held import joined, scaled, total
from assay.capture.marks import Directions
from assay.capture.recompute import Recompute
from assay.errors import InputError
from assay.methods.base import Context, Demand, MicroBatch
from assay.methods.booking import Aged, Booking, Books
from assay.methods.correction import Correction
from assay.methods.gradient import TargetGradients
from assay.methods.hessian import HessianProducts
from assay.methods.line import Line
from assay.methods.momentum import ExactTail, Tail, default_horizon, read_weights
from assay.methods.sketch import SketchTail
from assay.methods.step import Step, read_step
from assay.optimizers import OptimizerModel
from assay.optimizers.adafactor import Adafactor
from assay.optimizers.scalars import Multiple

if TYPE_CHECKING:
    from assay.distributed import OneProcess
    from assay.methods.in_run import InRunShapley

__all__ = ["InRunSession"]

COMPARED = 16  # of so many refreshed gradients one is compared with that before it


@dataclass
class _Open:
    """A step whose values wait for the gradient at its right end."""

    step: Step
    booking: Booking
    line: Line
    left: Directions
    correction: Correction | None


class InRunSession:
    """`InRunShapley` at work in one run."""

    def __init__(self, method: InRunShapley, context: Context) -> None:
        self.method, self.context = method, context
        self.params = context.weights.params
        self.processes = context.processes
        _check_processes(method, self.processes, context.optimizer)
        self.gradients = TargetGradients(
            method.target_gradient, self.processes, method.targets, context.weights
        )
        self.passes = self.gradients.passes
        self.books = Books(context.writer, method.target_names, method.band, method.path)
        self.seconds = 0.0
        self._hessian = HessianProducts(self.passes)
        self._tail = self._make_tail()
        self._tail_bytes = 0
        self._early = (  # K is known before the backward pass, and with it the direction of the left end
            method.granularity == "sample"
            and self._tail is None
            and not context.optimizer.preconditioned
            and not self.processes.sharded  # directions are gathered for a contraction, one parameter at a time
        )
        self._rides = self._early and method.path == "left"
        self._folds = (  # the one gradient that the step is asked about is known when it is read
            method.path == "left" and not self._rides and self._tail is None and not self.processes.sharded
        )
        self._bookings: list[Booking] = []
        self._open: _Open | None = None
        self._age = 0  # steps that were valued by the gradient at hand; 0 wants a new one
        self._refreshes = 0
        self._fresh: Directions | None = None  # of a step that is valued by an older gradient as well
        self.left: Directions = {}
        self._first = True

    def _make_tail(self) -> Tail | None:
        method, optimizer = self.method, self.context.optimizer
        self.horizon = 0
        if method.momentum != "instant":
            self.horizon = method.horizon or default_horizon(optimizer, self.params)
        if self.horizon == 0:
            return None
        if method.momentum == "exact":
            return ExactTail(optimizer, self.params, self.horizon)
        return SketchTail(optimizer, self.params, self.horizon, method.sketch)

    # --- the step ---

    def begin_step(self, step: int) -> Demand:
        """Take ∇ℓ_val(w_t); it closes the account of the step before. With `refresh`, of the block of steps before."""
        started = time.perf_counter()
        self._fresh = None
        if self._age % self.method.refresh == 0:
            older = self.left if self._compares() else None
            self.left = {}  # as large as the weights: let go of before the new one is made, where nothing waits for it
            self.losses, self.left = self.gradients.take()
            if self._first:
                self._check_losses()
            self._arrive(self.losses, self.left)
            if older is not None:  # the step is valued by both, to say what their age does
                self._fresh, self.left = self.left, joined([self.left, older])
            self._age = 0
            self._refreshes += 1
        self._age += 1
        demand = self._demand()
        self.seconds += time.perf_counter() - started
        return demand

    def retake(self) -> Demand:
        """The first step's ∇ℓ again, in the precision of the training's own forward pass."""
        started = time.perf_counter()
        self.losses, self.left = self.gradients.retake()
        demand = self._demand()
        self.seconds += time.perf_counter() - started
        return demand

    def _compares(self) -> bool:
        """Whether the step about to begin is valued by the last gradient as well: the second, the 18th, … time."""
        whole = self._age == self.method.refresh > 1
        return whole and self._refreshes % COMPARED == 1

    def _demand(self) -> Demand:
        """Directions K ∇ℓ_val where K and ∇ℓ are known before the backward pass; else the gradients are kept.

        Adam's K_t contains the current gradient in v_t. The published shortcut, v_{t−1}, is off by up to 1/ε wherever
        an entry gets its first gradient (docs/decisions/0003).
        """
        method, reduced = self.method, self.method.memory == "reduced"
        if self._rides or (self._early and reduced):
            gains = {param: self.context.optimizer.previous_gain(param) for param in self.params}
            directions = scaled(self.left, gains.get, [p for p, gain in gains.items() if gain is not None])
            return Demand(directions) if self._rides else Demand(directions, keep=self.params, rounded=True)
        if method.memory == "recompute":
            model, weights = self.context.model, self.context.weights
            return Demand(watch=lambda capture: Recompute(model, weights, capture))
        return Demand(keep=self.params, by_token=method.granularity == "token")

    def before_update(self, step: int, batches: Sequence[MicroBatch], scale: Tensor, gap: Tensor) -> None:
        """Read the step's causes, and value it where the gradient for that is there."""
        started = time.perf_counter()
        if self.method.granularity == "token" and not any(batch.positions for batch in batches):
            raise InputError(
                "InRunShapley(granularity='token'): none of the model's inputs was of integers [B, T] or of numbers "
                "[B, T, d], so there are no tokens; hand the sequence to the model itself, or leave granularity out."
            )
        read = read_step(
            self.context.optimizer, self.params, step, batches, scale, self.processes, self._rides,
            only=self.left if self._folds else None,
        )  # fmt: skip
        booking = Booking(step, self.losses, gap, [batch.ids for batch in batches])
        if self._tail is not None:
            self._tail.weigh(read)
        if self._rides:
            booking.values = read.riding_values()
            booking.carried, booking.decayed = read.carried_by(self.left), read.decayed_by(self.left)
            self._book(booking)
        elif self.method.path in ("trapezoid", "simpson"):
            moving = [p for p in self.context.optimizer.params() if p.requires_grad]
            self._open = _Open(read, booking, Line(moving), self.left, self._correction(read))
        else:
            gradient = self.left if self.method.path == "left" else self._second_order(read)
            self._settle(read, booking, gradient)
        self.seconds += time.perf_counter() - started

    def _correction(self, step: Step) -> Correction | None:
        if self.method.memory != "reduced":
            return None
        optimizer = self.context.optimizer
        lr = {p: optimizer.lr(optimizer.group_index(p)) for p in step.gains}
        values = step.riding_values() if self._early else step.values(self.left)
        return Correction.of(step, self.left, values, lr)

    def _second_order(self, step: Step) -> Directions:
        """∇ℓ − ½ H u with u = w_t − w_{t+1}, the step about to be taken."""
        u = {}
        for p, gain in step.gains.items():
            assert p.grad is not None
            lr = self.context.optimizer.lr(self.context.optimizer.group_index(p))
            carried, decayed = step.carried[p], step.decayed[p]
            assert not isinstance(carried, Multiple)  # of a step whose values rode
            assert not isinstance(decayed, Multiple)
            u[p] = (lr * gain * p.grad + carried + decayed).expand_as(p)
        return total([(1.0, self.left), (-0.5, self.gradients.again(self._hessian(u)))])

    def _settle(
        self, step: Step, booking: Booking, gradient: Directions, correction: Correction | None = None
    ) -> None:
        """The step's values and the account's lines, all from one mean gradient along it; the weights are w_t."""
        if self.method.granularity == "token":
            booking.tokens = step.token_values(gradient)
            booking.values = [found.sum(2) for found in booking.tokens]
        else:
            booking.values = step.values(gradient) if correction is None else correction.corrected(gradient)
        booking.carried, booking.decayed = step.carried_by(gradient), step.decayed_by(gradient)
        if self._tail is not None:
            booking.late = self._tail.share(step, gradient, booking.carried)
            self._tail.remember(step)
            self._tail_bytes = max(self._tail_bytes, self._tail.bytes())
        self._book(booking)

    def _book(self, booking: Booking) -> None:
        """A valued step: what other processes book for it counts in its account."""
        if self._fresh is not None:
            self._compare(booking)
        values = torch.stack([found.sum(1).double() for found in booking.values])
        late = torch.stack(
            [found.sum(1).double() for _, found in booking.late] or [torch.zeros_like(values[0])]
        )
        own = torch.stack([values.sum(0), late.sum(0)])  # [2, targets]
        all_values, all_late = self.processes.total(own)
        booking.carried = booking.carried - all_late.to(booking.carried)
        booking.elsewhere = all_values + all_late - own.sum(0)
        self._bookings.append(booking)

    def _compare(self, booking: Booking) -> None:
        """Of a step that was valued by two gradients, the fresh one counts; afterwards it alone is there."""
        n = len(self.method.target_names)
        fresh, stale = [v[:n] for v in booking.values], [v[n:] for v in booking.values]
        booking.aged = Aged(self.method.refresh, fresh, stale)
        booking.values, booking.tokens = fresh, [found[:n] for found in booking.tokens]
        booking.carried, booking.decayed = booking.carried[:n], booking.decayed[:n]
        self._keep_fresh()

    def _keep_fresh(self) -> None:
        if self._fresh is not None:
            self.left, self._fresh = self._fresh, None

    def _arrive(self, losses: Tensor, right: Directions | None = None) -> None:
        """The weights stand at the end of the last step: complete its booking.

        Args:
            losses: `[targets]` there.
            right: ∇ℓ there; needed where a step is open.
        """
        if self._open is not None:
            assert right is not None
            try:
                self._value(self._open, losses, right)
            except (
                Exception
            ):  # it would be the same again; a signal leaves the step to be valued at the close
                self._open = None
                raise
            self._open = None
        waiting = [booking for booking in self._bookings if booking.after is None]
        for booking in waiting:
            booking.after, booking.joins = losses, booking is not waiting[-1]
        self._age = 0

    def _value(self, open_: _Open, losses: Tensor, right: Directions) -> None:
        """Value a step by the mean gradient along its line, of which the weights stand at the end."""
        open_.line.end()
        drop = open_.booking.before - losses
        integral = self.method.quadrature.integrate(
            open_.line,
            open_.left,
            right,
            drop,
            _rounding(losses),
            lambda: self.gradients.take()[1],
            self.processes,
        )
        booking = open_.booking
        booking.points, booking.met, booking.seconds = integral.points, integral.met, integral.seconds
        reads = self.method.memory == "recompute" or not self.processes.all(not read_weights(open_.step))
        with torch.no_grad(), open_.line.at(0) if reads else nullcontext():
            self._settle(open_.step, booking, integral.gradient, open_.correction)

    def skipped(self, step: int) -> None:
        """Nothing moved: an empty row that says so."""
        gap = torch.zeros((), device=self.losses.device)
        self._keep_fresh()
        self._bookings.append(Booking(step, self.losses, gap, after=self.losses, status="skipped"))

    def unattended_update(self) -> None:
        """Weights are about to move by a step that was not seen: measure the last one's effect now."""
        self._finish()
        self._age = 0
        if self._tail is not None:
            self._tail.pass_by()

    def _finish(self) -> None:
        """Complete the last step's booking without a next step."""
        if self._open is not None:
            self._arrive(*self.gradients.take())
        elif any(booking.after is None for booking in self._bookings):
            self._arrive(self.passes.losses())

    # --- booking ---

    def settle(self) -> None:
        """Value the last step now, at the weights as they stand, and not when the next one begins."""
        self._finish()

    def close(self) -> None:
        """Measure the effect of the last step, and hand everything over."""
        self._finish()
        self.flush()

    def flush(self) -> None:
        """Move what is complete to the host, in bulk, and to the ledger's writer."""
        done = [b for b in self._bookings if b.after is not None]
        self._bookings = [b for b in self._bookings if b.after is None]
        self.books.write(done)
        if done:
            self._write_momentum()
            self.books.warn_of_share()

    def _write_momentum(self) -> None:
        if self._tail is not None:
            row = {"momentum": self.method.momentum, "horizon": self.horizon, "bytes": self._tail_bytes}
            self.context.writer.add_table("momentum", pl.DataFrame([row]))

    def explained(self) -> Mapping[str, float]:
        """(Σ predicted + carried + decayed) / Σ actual, by target, over the steps written so far."""
        return self.books.explained()

    def _check_losses(self) -> None:
        self._first = False
        for name, loss in zip(self.method.target_names, self.losses.tolist(), strict=True):
            if loss != loss or abs(loss) == float("inf"):
                raise InputError(
                    f"target {name!r}: its loss is {loss} at the first step, so nothing can be valued against it; "
                    "check its batches and its loss function."
                )


def _check_processes(method: InRunShapley, processes: OneProcess, optimizer: OptimizerModel) -> None:
    """Refuse what has no exact form where each process holds a part of the model."""
    if not processes.sharded:
        return
    for argument, value, instead in (
        ("path", "hessian", "trapezoid"),
        ("momentum", "sketch", "exact"),
        ("memory", "recompute", "keep"),
        ("granularity", "token", "sample"),
    ):
        if getattr(method, argument) == value:
            raise InputError(
                f"InRunShapley({argument}={value!r}) is not to be had under fully_shard; choose {argument}={instead!r} "
                "or train with DistributedDataParallel."
            )
    if isinstance(optimizer, Adafactor):
        raise InputError(
            "Run(optimizer): Adafactor's factored moments mix the shards of a parameter; under fully_shard use AdamW."
        )


def _rounding(losses: Tensor) -> Tensor:
    """`[targets]`: how far a difference of two such losses may be off by rounding alone."""
    return 4 * torch.finfo(losses.dtype).eps * losses.abs()
