"""The run: rides along with a training loop, and books what every example did.

    model → capture → methods → store

The user's loop calls `run.step(ids)` around the forward and backward pass of each micro-batch; the optimizer's own
step hooks tell the run when the weights move. Nothing of the training itself changes.
"""

from __future__ import annotations

import difflib
import fnmatch
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from assay.capture import Capture, Coverage, Weights, contract
from assay.capture.check import check_capture
from assay.capture.fallback import Boundary
from assay.capture.totals import check_totals, gradients_of
from assay.errors import InputError
from assay.methods.base import Context, Demand, Method, MicroBatch, Session
from assay.optimizers import OptimizerModel, model_of
from assay.scale import GradientScale
from assay.store import Ledger, RunWriter
from assay.store.ids import IdKind, id_series, kind_of_dtype

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
        methods: what to measure, `InRunShapley(...)`.
        metadata: a table with a column `id` and whatever else is known of the samples (domain, source, text).
        info: anything JSON-able to keep with the results (configuration, seed, versions).
        exclude: names of parameters (or patterns such as `"visual.*"`) to leave out; scores are then partial.
        check: "first" compares the capture with plain autograd on the first micro-batch; "off" does not.
        strict: leave torch's own weight gradients untouched: training is bit for bit what it is without assay, at
            the price of one more matrix product per layer. Otherwise it is the same up to rounding.
        optimizer_model: "sgd" to score an unsupported optimizer as if it were plain SGD.

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
    ) -> None:
        if check not in ("first", "off"):
            raise InputError(f"Run(check={check!r}) is not known; choose 'first' or 'off'.")
        if not methods:
            raise InputError("Run(methods=[...]): there is nothing to measure; give at least one method.")
        self.model, self.strict = model, strict
        self.optimizer: OptimizerModel = model_of(optimizer, override=optimizer_model)
        self.weights, self._coverage = _watched(model, self.optimizer, exclude)
        names = [name for method in methods for name in method.target_names]
        described = {"methods": [dict(method.describe()) for method in methods], **(info or {})}
        self.writer = RunWriter(out, targets=names, info=described)
        if metadata is not None:
            self.writer.add_metadata(metadata)
        context = Context(model, self.weights, self._coverage, self.optimizer, self.writer)
        self._sessions: list[Session] = [method.attach(context) for method in methods]
        self._to_close = list(self._sessions)
        groups = self.weights.groups
        self._scale = GradientScale(self.weights.params, groups, self.weights.number_of_groups)
        self._step = 0
        self._id_kind: IdKind | None = None
        self._pending: list[MicroBatch] = []
        self._demand = Demand()
        self._inside = self._closed = self._written = False
        self._check_due = self._totals_due = check == "first"
        self._curve: list[dict[str, float]] = []
        self._seconds = 0.0
        inner = self.optimizer.optimizer
        self._hooks = [
            inner.register_step_pre_hook(lambda *_: self._before_update()),
            inner.register_step_post_hook(lambda *_: self._after_update()),
        ]

    # --- the user's side ---

    @contextmanager
    def step(self, ids: Sequence[int | str] | Tensor) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch.

        Args:
            ids: one id per sample, ints or strings, in the order of the rows of the micro-batch. A repeated id adds
                up.

        Raises:
            InputError: the number of ids is not that of the rows that reached the model; no backward pass happened
                inside; the run is closed; a step inside a step.
            CoverageError: a parameter is used in a way that has no exact rule, and is not excluded.
        """
        self._check_open()
        started = time.perf_counter()
        ids = self._known_ids(ids)
        self._begin()
        capture = self._new_capture(len(ids))
        before = gradients_of(self.weights) if self._totals_due else {}
        first_input = self.model.register_forward_pre_hook(
            lambda module, args, kwargs: self._see_input(capture, args, kwargs), with_kwargs=True
        )
        self._inside = True
        self._seconds += time.perf_counter() - started
        try:
            with Boundary(self.model, self.weights, capture) as boundary, capture:
                yield
        finally:
            self._inside = False
            first_input.remove()
        started = time.perf_counter()
        self._pending.append(self._finished(ids, capture, boundary, before))
        self._scale.after_backward()
        self._seconds += time.perf_counter() - started

    def _new_capture(self, batch: int) -> Capture:
        """For the first micro-batch everything is kept, so that its totals can be checked."""
        keep = self.weights.params if self._totals_due else self._demand.keep
        directions = None if self._totals_due else self._demand.directions
        return Capture(
            self.weights, batch, directions, keep=keep, strict=self.strict, coverage=self._coverage
        )

    def _finished(
        self,
        ids: Sequence[int | str],
        capture: Capture,
        boundary: Boundary,
        before: Mapping[Parameter, Tensor],
    ) -> MicroBatch:
        """What a micro-batch left, once its backward pass is done."""
        capture.own_kept()
        scores, kept = boundary.finish(), capture.kept
        if scores is None:
            reason = "no backward pass happened" if capture.uses else "the model was not used"
            raise InputError(
                f"run.step(ids): {reason} inside; put both the forward pass and loss.backward() in it."
            )
        self._coverage.check_all_seen()
        if self._totals_due:
            self._totals_due = False
            check_totals(self.weights, kept, scores, before)
            if self._demand.directions is not None:
                scores, kept = contract(kept, self._demand.directions, scores), []
        return MicroBatch(ids, scores, kept)

    def coverage(self) -> pl.DataFrame:
        """How each parameter is covered: `parameter, entries, percent, status, operations`.

        Known once a step has been taken; `status` is "exact", "forward mode" or "sample loop" (exact by a fallback,
        with its cost under `operations`), "unused", "excluded", "frozen" or "not optimized".
        """
        return self._coverage.frame()

    def log(self, values: Mapping[str, float]) -> None:
        """Keep a row of a training curve (loss, tokens per second, …) beside the values; table "curve"."""
        self._curve.append({"step": float(self._step), **{k: float(v) for k, v in values.items()}})

    def status(self) -> RunStatus:
        """How far the run is, and what it has cost."""
        explained: dict[str, float] = {}
        for session in self._sessions:
            session.flush()
            explained.update(session.explained())
        within = sum(session.seconds for session in self._sessions)
        return RunStatus(self._step, explained, within, self._seconds)

    @property
    def ledger(self) -> Ledger:
        """What was recorded so far."""
        for session in self._sessions:
            session.flush()
        return self.writer.ledger

    def close(self) -> None:
        """Book the last step, write everything and let go of the optimizer.

        Calling it again does nothing, unless the disk refused: then it tries once more to write.
        """
        if not self._closed:
            self._closed = True
            for hook in self._hooks:
                hook.remove()
        while self._to_close:
            self._to_close.pop(0).close()  # if the disk refuses, what it handed over has been taken
        if not self._written:
            self.writer.add_table("coverage", self.coverage())
            if self._curve:
                self.writer.add_table("curve", pl.DataFrame(self._curve))
            self.writer.close()
            self._written = True

    def __enter__(self) -> Run:
        """The run itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Close, also after an exception: what was recorded is kept."""
        self.close()

    # --- the optimizer's side ---

    def _begin(self) -> None:
        """Before a micro-batch: start an optimizer step if none is open."""
        if self._pending and all(p.grad is None for p in self.weights.params):
            self._discard()
        if not self._pending:
            demands = [session.begin_step(self._step) for session in self._sessions]
            self._demand = demands[0]

    def _discard(self) -> None:
        """The gradients of the open step were thrown away without an update (a loss scaler's overflow)."""
        self._pending = []
        for session in self._sessions:
            session.skipped(self._step)
        self._step += 1

    @torch.no_grad()
    def _before_update(self) -> None:
        if not self._pending:
            for session in self._sessions:
                session.unattended_update()
            return
        started = time.perf_counter()
        scale, gap = self._scale.before_step()
        for session in self._sessions:
            session.before_update(self._step, self._pending, scale, gap)
        self._pending = []
        self._step += 1
        self._seconds += time.perf_counter() - started

    def _after_update(self) -> None:
        if self._step % 64 == 0:
            for session in self._sessions:
                session.flush()

    # --- checks ---

    def _see_input(self, capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """On each forward pass of the model in a step: the ids match the rows; once, the start-up check."""
        if capture.paused or not torch.is_grad_enabled():
            return
        leaves = torch.utils._pytree.tree_leaves((args, dict(kwargs)))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        rows = [x.shape[0] for x in tensors if x.dim()]
        if rows and capture.batch not in rows:
            raise InputError(
                f"run.step(ids): {capture.batch} ids were given, but the model received tensors of "
                f"{', '.join(map(str, dict.fromkeys(rows)))} rows; give one id per row of dimension 0."
            )
        for tensor in tensors:
            capture.enter(tensor)
        if self._check_due and capture.batch > 1:
            self._check_due = False
            capture.paused = True
            try:
                check_capture(self.model, args, kwargs, self.weights, capture.batch, self._coverage)
            finally:
                capture.paused = False

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


def _watched(model: Module, optimizer: OptimizerModel, exclude: Iterable[str]) -> tuple[Weights, Coverage]:
    """The parameters to watch, and what is left out with the reason."""
    named = dict(model.named_parameters())  # a shared parameter appears once, under its first name
    owned = set(optimizer.params())
    _check_ownership(named, owned)
    patterns = list(exclude)
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            near = difflib.get_close_matches(pattern, named, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"Run(exclude=[{pattern!r}]): the model has no such parameter{hint}")
    left_out: dict[str, tuple[int, str]] = {}
    watched: list[tuple[str, Parameter]] = []
    for name, param in named.items():
        reason = (
            "excluded"
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            else "frozen"
            if not param.requires_grad
            else "not optimized"
            if param not in owned
            else None
        )
        if reason is None:
            watched.append((name, param))
        else:
            left_out[name] = (param.numel(), reason)
    if not watched:
        raise InputError("Run(model, optimizer): no trainable parameter is left to watch.")
    groups = {param: optimizer.group_index(param) for _, param in watched}
    weights = Weights(watched, groups, model.buffers())
    return weights, Coverage(weights.names, left_out)


def _check_ownership(named: Mapping[str, Parameter], owned: set[Parameter]) -> None:
    params = set(named.values())
    foreign = owned - params
    if foreign:
        raise InputError(
            f"Run(model, optimizer): {len(foreign)} of the optimizer's {len(owned)} parameters are not in the model; "
            "pass the module that holds them all (before wrapping), and the optimizer that was made from it."
        )
