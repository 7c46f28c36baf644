"""The run: rides along with a training loop, and books what every example did.

    model → capture → methods → store

The user's loop calls `run.step(ids)` around the forward and backward pass of each micro-batch; the optimizer's own
step hooks tell the run when the weights move. Nothing of the training itself changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Module
from torch.optim import Optimizer

from assay.distributed import parallel_of
from assay.errors import AssayError, InputError, StoreError
from assay.faults import Faults
from assay.methods.base import Context, Method, MicroBatch, Session, Settles, no_scaler
from assay.methods.demands import (
    check_for_resuming,
    check_for_several_processes,
    check_methods,
    sample_weights,
)
from assay.microbatch import Watcher, Watching
from assay.open_step import OpenStep
from assay.optimizers import OptimizerModel, model_of
from assay.resume import Resume, first_step
from assay.scale import GradientScale
from assay.signals import Termination
from assay.snapshots import Snapshots, snapshot_settings
from assay.step_hooks import StepHooks
from assay.store import Ledger, RunWriter, shard_of
from assay.store.ids import IdKind, id_series, kind_of_dtype
from assay.targets import full_precision
from assay.watched import fingerprint, watched

__all__ = ["Run", "RunStatus"]


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Args:
        step: optimizer steps booked.
        explained: by target, the share of the loss drop so far that the account explains (1.0 = all of it).
        validation_seconds: seconds spent on the targets' passes.
        seconds: seconds spent in assay's own code outside the forward and backward pass.
    """

    step: int
    explained: Mapping[str, float]
    validation_seconds: float
    seconds: float


class Run:
    """Watches a training run and keeps its ledger; also a context manager.

    Args:
        model: the module that is trained; all trainable parameters that the optimizer owns are watched.
        optimizer: the optimizer that trains it.
        out: folder for the results, or None to keep them in memory.
        methods: what to measure, `InRunShapley(...)` or `DataValueEmbedding(...)` or several of them.
        metadata: a table with a column `id` and whatever else is known of the samples (domain, source, text).
        info: anything JSON-able to keep with the results (configuration, seed, versions).
        exclude: names of parameters (or patterns such as `"visual.*"`) to leave out; scores are then partial.
        check: "first" compares the capture with plain autograd on the first micro-batch; "off" does not.
        strict: leave torch's own weight gradients untouched: training is bit for bit what it is without assay, at
            the price of one more matrix product per layer. Otherwise it is the same up to rounding.
        optimizer_model: "sgd" to score an unsupported optimizer as if it were plain SGD.
        on_error: "raise", or "detach": where an error of assay's own would stop the training, it is warned of and
            logged once, nothing more is measured, and training goes on with the gradients that it would have had.
        resume: go on with the run that `out` holds: its ids, its step numbers, one ledger. What `state_dict` gave
            when the checkpoint was saved, or the step, or True to find the step by the optimizer's own count. Steps
            from there on that were recorded before count no more. Without a run in `out`, a new one begins.
        snapshots: what `Ledger.adjoint` replays the run from: "auto" (about √T of them after T steps), the number of
            steps between two, or a budget such as "2 GB"; None takes none.
        scaler: the `GradScaler` of a training in fp16. Only data value embeddings with `curvature="fisher"` need it:
            by default they take it that the samples' weights in the loss add up to one.

    Raises:
        InputError: the optimizer does not own the model's parameters, or an argument is not understood.
        UnsupportedOptimizerError: the optimizer's step is not known to be linear in the gradient.
        StoreError: `out` cannot be written, or holds a run already.

    Example:
        >>> import assay, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> target = assay.Target([(torch.ones(1, 2), torch.zeros(1, 1))], loss_fn)
        >>> with assay.Run(model, optimizer, methods=[assay.InRunShapley({"zero": target})]) as run:
        ...     with run.step(["a", "b", "c"]):
        ...         loss_fn(model, (torch.randn(3, 2), torch.randn(3, 1))).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> run.ledger.values("zero").shape
        (3, 3)
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        out: str | Path | None = None,
        methods: Sequence[Method] = (),
        *,
        metadata: pl.DataFrame | None = None,
        info: Mapping[str, Any] | None = None,
        exclude: Iterable[str] = (),
        check: str = "first",
        strict: bool = False,
        optimizer_model: Literal["sgd"] | None = None,
        on_error: Literal["raise", "detach"] = "raise",
        resume: Resume = False,
        snapshots: Snapshots | str | int | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        if check not in ("first", "off"):
            raise InputError(f"Run(check={check!r}) is not known; choose 'first' or 'off'.")
        self.faults = Faults(on_error)
        taken = snapshot_settings(snapshots)
        methods = [*methods, *([] if taken is None else [taken])]
        check_methods(methods)
        self.processes = parallel_of(model)
        if self.processes.size > 1:
            check_for_several_processes(methods)
        self.model = self.processes.module
        self.optimizer: OptimizerModel = model_of(optimizer, override=optimizer_model)
        self.weights, self._coverage = watched(self.processes, self.optimizer, exclude)
        names = [name for method in methods for name in method.target_names]
        described = {
            "methods": [dict(method.describe()) for method in methods],
            "weights": fingerprint(self.weights),
            **(info or {}),
        }
        if self.processes.size > 1:
            described["processes"] = {"kind": self.processes.kind, "size": self.processes.size}
        folder = shard_of(out, self.processes.rank)
        step = first_step(resume, out, self.optimizer, self.processes)
        if step is not None:
            check_for_resuming(methods)
        self.writer = self.processes.in_turn(
            lambda: RunWriter(folder, targets=names, info=described, resume=step)
        )
        if metadata is not None and self.processes.rank == 0:
            self.writer.add_metadata(metadata)
        context = Context(
            self.model, self.weights, self._coverage, self.optimizer, self.writer, self.processes, step,
            scaler.get_scale if scaler is not None and scaler.is_enabled() else no_scaler,
        )  # fmt: skip
        self._sessions: list[Session] = [method.attach(context) for method in methods]
        self._to_close = list(self._sessions)
        groups = self.weights.groups
        self._scale = GradientScale(
            self.weights.params, groups, self.weights.number_of_groups, self.processes
        )
        self._open = OpenStep(self.model, self.weights.params, self.optimizer, self.processes, self._coverage)
        self._step = step or 0
        self._id_kind: IdKind | None = self.writer.id_kind
        self._pending: list[list[MicroBatch]] = []  # by micro-batch, one per method
        self._inside = self._backward = self._closed = self._written = False
        self._step_open = self._agreed_to_stop = False
        self._termination = Termination()
        self._device = self.weights.params[0].device
        self._watcher = Watcher(
            self.processes, self.weights, self._coverage, self.faults, strict=strict, check=check == "first"
        )
        self._seconds = 0.0
        self._hooks = StepHooks(self.optimizer.optimizer, self._before_update, self._after_update)

    # --- the user's side ---

    @contextmanager
    def step(
        self,
        ids: Sequence[int | str] | Tensor,
        weights: Sequence[float] | Tensor | None = None,
        inputs: Any = (),
    ) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch.

        Args:
            ids: one id per sample, ints or strings, in the order of the rows of the micro-batch. A repeated id adds
                up.
            weights: `[B]`, what each sample's own loss is multiplied by in the scalar that `backward()` is called
                on: `tokens_i / tokens` for a mean over tokens, 1 for a sum; times the loss scale under a loss
                scaler; below zero where the sample's loss is raised, or the scalar maximised. Only data value
                embeddings with `curvature="fisher"` read it. By default all samples of an optimizer step weigh the
                same and add up to one, as in a mean over samples.
            inputs: tensors, in any containers, whose rows are the samples; needed only where the loss calls parts of
                the model and not the model itself, whose inputs are seen anyway.

        Raises:
            InputError: the number of ids is not that of the rows that reached the model; no backward pass happened
                inside; the run is closed; a step inside a step.
            CoverageError: a parameter is used in a way that has no exact rule, and is not excluded.
        """
        watching: Watching | None = None
        self.processes.precision.around(self._device)
        with ExitStack() as closing:
            with self._work("before a micro-batch"):
                watching = self._watch(ids, weights, inputs, closing)
            if self.faults.first is not None:
                closing.close()
            yield
        with self._work("after a micro-batch"):
            if self._watcher.totals_due and self.processes.reduced():
                self._agree()
            if watching is not None and self.faults.first is None:
                self._take(watching)

    def _watch(self, ids: Any, weights: Any, inputs: Any, closing: ExitStack) -> Watching | None:
        """Start watching a micro-batch, until `closing`; None for a run that has detached."""
        if self._opens_step():
            self._agree()
        if self.faults.first is not None:
            return None
        self._check_open()
        known = self._known_ids(ids)
        given = sample_weights(weights, len(known))
        self._begin()
        self._inside, self._backward = True, False
        closing.callback(self._left)
        watching = self._watcher.watch(known, given, inputs, closing)
        watching.capture.before_backward = self._before_backward
        return watching

    def _left(self) -> None:
        self._inside = False

    def _take(self, watching: Watching) -> None:
        """What a micro-batch left, once its backward pass is done."""
        self._pending.append(self._watcher.finished(watching))
        self._scale.after_backward()
        self._open.after_backward()

    @contextmanager
    def _work(self, where: str) -> Iterator[None]:
        """Around work of assay's own: it is timed, in full precision, and ends where it fails."""
        started = time.perf_counter()
        try:
            with self.faults.caught(where), full_precision(self._device):
                yield
        finally:
            self._seconds += time.perf_counter() - started
        if self.faults.first is not None and self._to_close:
            self._detach()

    def _detach(self) -> None:
        """Nothing more is measured; what was booked reaches the disk now or at the end."""
        self._to_close, self._pending = [], []
        self._watcher.stop()
        with self.faults.caught("in detaching"):
            for session in self._sessions:
                session.flush()
        self._sessions = []
        with self.faults.caught("in detaching"):
            self.writer.update_info({"detached": {"step": self._step, "reason": self.faults.reason}})
            self.writer.flush()

    def coverage(self) -> pl.DataFrame:
        """How each parameter is covered: `parameter, entries, percent, status, operations`.

        Known once a step has been taken; `status` is "exact", "forward mode" or "sample loop" (exact by a fallback,
        with its cost under `operations`), "unused", "not measured" (nor is any other: snapshots alone under
        `check="off"`), "excluded", "frozen", "not optimized" or "trained later" (than the run began, and not
        watched).
        """
        return self._coverage.frame()

    def log(self, values: Mapping[str, float]) -> None:
        """Keep a row of a training curve (loss, tokens per second, …) beside the values; table "curve".

        It is of the step that is open, between steps of the last one, as the account numbers them.

        Raises:
            StoreError: the disk refuses; the row is kept.
        """
        row = {name: float(value) for name, value in values.items()}
        step = self._step if self._pending or self._inside else max(self._step - 1, 0)
        if self.processes.rank == 0 and not self._written:
            with self._work("in writing"):
                self.writer.add_step("curve", float(step), row)

    def status(self) -> RunStatus:
        """How far the run is, and what it has cost."""
        explained: dict[str, float] = {}
        with self._work("in writing"):
            for session in self._sessions:
                session.flush()
                explained.update(session.explained())
        within = sum(session.seconds for session in self._sessions)
        return RunStatus(self._step, explained, within, self._seconds)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the training must hold for `Run(resume=...)`; call it between two optimizer steps.

        Everything up to here is valued and written, so that the checkpoint finds it: that costs one validation pass.
        Where several processes train together, all of them call it.

        Raises:
            InputError: micro-batches wait for their optimizer step.
            StoreError: the disk refuses.
        """
        if self._pending and self._open.thrown_away():
            self._discard()  # a loss scaler passed over the step
        if self._pending:
            raise InputError("run.state_dict(): micro-batches wait for optimizer.step(); call it after that.")
        with self._work("in writing"):
            for session in self._sessions:
                if isinstance(session, Settles):
                    session.settle()
                session.flush()
            self.writer.flush()
        return {"step": self._step}

    @property
    def ledger(self) -> Ledger:
        """What was recorded so far."""
        with self._work("in writing"):
            for session in self._sessions:
                session.flush()
        return self.writer.ledger

    def close(self) -> None:
        """Book the last step, write everything and let go of the optimizer.

        Calling it again does nothing, unless the disk refused: then it tries once more to write. Where several
        processes train together, all of them call it.
        """
        self._close(together=True)

    def _close(self, together: bool) -> None:
        """Without the others, where they may never come here: the last step stays open."""
        with self._work("in closing"):
            self._finish(together)

    def _finish(self, together: bool) -> None:
        if not self._closed:
            self._closed = True
            self._hooks.remove()
            self._watcher.close()
        while self._to_close:
            session = self._to_close.pop(0)  # if the disk refuses, what it handed over has been taken
            session.close() if together else session.flush()
        if not self._written:
            # a resumed run that had nothing left to do keeps what is known from before
            known = "coverage" in self.writer.ledger.tables
            if self.processes.rank == 0 and (self._coverage.uses or not known):
                self.writer.add_table("coverage", self.coverage())
            self.writer.close()
            self._written = True

    def __enter__(self) -> Run:
        """The run itself; a SIGTERM inside, which nobody else handles, leaves the block and closes the run."""
        self._termination.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Close, also after an exception: what was recorded is kept."""
        self._termination.remove()
        self._close(together=error is None or self.processes.size == 1)

    # --- the optimizer's side ---

    def _opens_step(self) -> bool:
        """Whether a micro-batch is the first of an optimizer step."""
        opens = not self._step_open or (self.processes.size > 1 and self._open.thrown_away())
        self._step_open = True
        return opens

    def _agree(self) -> None:
        """Where one of several processes has detached, all do (collective)."""
        if self.processes.size == 1 or not self.faults.detaches or self._agreed_to_stop:
            return
        if not self.processes.all(self.faults.first is None):
            self._agreed_to_stop = True
            if self.faults.first is None:
                raise AssayError(
                    "another process of the run has stopped its attribution: look at its log for the reason"
                )

    def _begin(self) -> None:
        """Before a micro-batch: start an optimizer step if none is open."""
        if self._pending and self._open.thrown_away():
            self._discard()
        elif self._pending:
            self._open.go_on()
        if not self._pending:
            self._open.begin()
            self._hooks.come_last()
            self._watcher.begin(self._sessions, self._step)

    def _before_backward(self) -> None:
        """The loop may zero the gradients inside of the block, before the backward pass."""
        self._backward = True
        if self._pending and self._open.thrown_away():
            self._pending = []  # the step that has begun goes on with this micro-batch

    def _discard(self) -> None:
        """The gradients of the open step were thrown away without an update (a loss scaler's overflow)."""
        self._pending = []
        self._open.passed_over(self._step)
        for session in self._sessions:
            session.skipped(self._step)
        self._step += 1

    def _before_update(self) -> None:
        with self._work("before an update"), torch.no_grad():
            self._step_open = False
            self._agree()
            if self.faults.first is None:
                self._read_update()

    def _read_update(self) -> None:
        if self._inside and self._backward:
            raise InputError(
                "optimizer.step() was called inside of `with run.step(ids)`; call it after the block, which ends with "
                "loss.backward()."
            )
        if self.optimizer.overflowed():
            if self._pending:
                self._discard()
            return
        if not self._pending:
            for session in self._sessions:
                session.unattended_update()
            return
        if not self.processes.reduced():
            raise InputError(
                "optimizer.step(): the last backward pass did not reduce the gradients over the processes, so that "
                "each would train a model of its own; leave no_sync() for the last micro-batch of a step."
            )
        scale, gap = self._scale.before_step()
        refused: StoreError | None = None
        for session, batches in zip(self._sessions, zip(*self._pending, strict=True), strict=True):
            try:
                session.before_update(self._step, batches, scale, gap)
            except StoreError as error:  # what it was given has been taken
                refused = refused or error
        self._pending = []
        self._step += 1
        if refused is not None:
            raise refused

    def _after_update(self) -> None:
        if self._step % 64 == 0 and self.faults.first is None:
            with self._work("in writing"):
                for session in self._sessions:
                    session.flush()

    # --- checks ---

    def _known_ids(self, ids: Any) -> Sequence[int | str]:
        """The ids as they will be stored, checked before anything happens."""
        series = id_series(ids, self._id_kind)
        if not len(series):
            raise InputError("run.step(ids): 0 ids were given; give one per sample of the micro-batch.")
        self._id_kind = kind_of_dtype(series.dtype)
        return series.to_list()

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("run.step(ids): the run is closed; make a new assay.Run for further training.")
        if self._inside:
            raise InputError(
                "run.step(ids): already inside a step; close the one around the last micro-batch first."
            )
