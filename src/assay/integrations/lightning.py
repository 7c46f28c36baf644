"""`AssayCallback` for Lightning's Trainer (`lightning` or `pytorch_lightning`), with automatic optimization.

Lightning steps the optimizer with a closure that holds the training step, the backward pass and the clipping. A step
of the run opens before the training step and closes after the backward pass; `assay.Run` looks at the gradient when
the closure returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList
from torch.utils._pytree import tree_leaves

from assay.errors import InputError
from assay.integrations.identity import content_id
from assay.integrations.live import LiveValues
from assay.integrations.options import further_methods, of_shapley
from assay.methods import InRunShapley
from assay.methods.base import Method
from assay.run import Run
from assay.store import Ledger
from assay.targets import Target

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as error:
        raise ImportError("lightning is not installed: pip install 'assay[lightning]'") from error

__all__ = ["AssayCallback"]


class _NoBackward(Exception):  # noqa: N818 (not an error: the training step chose to skip its batch)
    """Leaves a step of the run in which no backward pass happened."""


class AssayCallback(Callback):  # type: ignore[misc]
    """Values every training example of a Lightning Trainer while it trains.

    Gradient accumulation, clipping, mixed precision and validation in between need nothing further.

    Args:
        targets: `{name: assay.Target}`, or one. Its `loss(model, batch)` gets the LightningModule; call what your
            training step calls, without `self.log`.
        out: folder for the results, or None to keep them in memory.
        ids: the key of the batch (a mapping) under which the ids of its examples are, or a function of the batch that
            returns them. Without it an example is named by a hash of its row of the batch; where the batch has an
            `attention_mask`, of what it does not mask. Rows whose padding or augmentation changes from epoch to epoch
            need ids of their own.
        metadata: a table with a column `id`, as for `assay.Run`.
        group: one of its columns, whose sums are logged while training.
        log_every: numbers go to the trainer's loggers once in so many optimizer steps; by default as often as
            the trainer's own.
        path: see `assay.InRunShapley`.
        momentum: see `assay.InRunShapley`.
        methods: further methods for the same run.
        **options: further ones of `assay.InRunShapley` (`granularity`, `refresh`, `memory`, `target_gradient`, …),
            and of `assay.Run`: `info`, `exclude`, `check`, `strict`, `optimizer_model`, `on_error`, `snapshots`.

    Raises:
        InputError: a column to group by that the metadata has not, an `InRunShapley` among the methods, or (in
            training) manual optimization, several optimizers, or a batch without the ids.

    Example:
        >>> target = Target([None], lambda module, batch: module(torch.ones(1, 2)).sum())
        >>> AssayCallback({"sum": target}, ids="doc").run is None  # until the trainer fits
        True
    """

    def __init__(
        self,
        targets: Mapping[str, Target] | Target,
        out: str | Path | None = None,
        *,
        ids: str | Callable[[Any], Sequence[int | str] | Tensor] | None = None,
        metadata: pl.DataFrame | None = None,
        group: str | None = None,
        log_every: int | None = None,
        path: str = "left",
        momentum: str = "instant",
        methods: Sequence[Method] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        self.run: Run | None = None
        own, options = of_shapley(options)
        self._given = {"path": path, "momentum": momentum, **own}
        self._shapley = InRunShapley(targets, **self._given)
        self._methods = further_methods(methods)
        self._out, self._ids, self._options = out, ids, options
        self._metadata, self._log_every = metadata, log_every
        self._groups = None if group is None else _groups(metadata, group)
        self._step: AbstractContextManager[None] | None = None
        self._live: LiveValues | None = None
        self._logged = 0

    @property
    def ledger(self) -> Ledger:
        """What was recorded so far.

        Raises:
            InputError: training has not begun.
        """
        if self.run is None:
            raise InputError("AssayCallback.ledger: training has not begun; call trainer.fit(...) first.")
        return self.run.ledger

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the run, on what the training step calls."""
        if not pl_module.automatic_optimization:
            raise InputError(
                "AssayCallback: this module optimizes by hand; put `with run.step(ids):` around its forward and "
                "backward pass instead (docs, the plain loop)."
            )
        if trainer.world_size > 1:
            raise InputError(
                f"AssayCallback follows one process, and this training has {trainer.world_size}; use assay.Run in a "
                "loop of your own, or one device."
            )
        if len(trainer.optimizers) != 1:
            raise InputError(
                f"AssayCallback: it follows one optimizer, this module has {len(trainer.optimizers)}."
            )
        info = {
            "trainer": "Lightning",
            "versions": {"lightning": _version(), "torch": torch.__version__},
            **({"resumed_from_step": trainer.global_step} if trainer.global_step else {}),
            **self._options.pop("info", {}),
        }
        optimizer = trainer.optimizers[0]
        targets = {name: _of_module(target, pl_module) for name, target in self._shapley.targets.items()}
        methods = [InRunShapley(targets, **self._given), *self._methods]
        options = {
            "resume": trainer.global_step if trainer.global_step and self._out else False,
            "scaler": getattr(trainer.precision_plugin, "scaler", None),
            **self._options,
        }
        self.run = Run(
            _called(pl_module),
            optimizer,
            self._out,
            methods,
            metadata=self._metadata,
            info=info,
            **options,
        )
        self._live = LiveValues(self.run)
        # the last step is settled before another callback, at the end of training, puts in other weights
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Open a step for the micro-batch."""
        assert self.run is not None
        self._step = self.run.step(self._names(batch), inputs=batch)
        self._step.__enter__()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Close it: the gradient is there, and not clipped yet."""
        if self._step is not None:
            step, self._step = self._step, None
            step.__exit__(None, None, None)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave a step that had no backward pass, and log."""
        self._abandon()
        every = self._log_every or trainer.log_every_n_steps
        if trainer.global_step >= self._logged + every and trainer.loggers and self._live is not None:
            self._logged = trainer.global_step
            assert self.run is not None
            numbers = self._live.read(self._groups)
            self.run.log(numbers)
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """A checkpoint is about to be written: so is everything recorded up to it."""
        if self.run is None or self._live is None:
            return
        try:
            self.run.state_dict()
        except (
            InputError
        ):  # in the middle of a step, of whose beginning a training that is resumed knows nothing
            self.run.status()
            self.run.writer.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Book the last step and close the run."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """What was recorded is kept, also after an error or Ctrl-C."""
        self._abandon()
        self._close()

    # --- inside ---

    def _close(self) -> None:
        if self.run is not None:
            self._live = None
            self.run.close()

    def _abandon(self) -> None:
        if self._step is not None:
            step, self._step = self._step, None
            with suppress(_NoBackward):
                step.__exit__(_NoBackward, _NoBackward(), None)

    def _names(self, batch: Any) -> Any:
        if callable(self._ids):
            return self._ids(batch)
        if self._ids is None:
            return _content_ids(batch)
        if not isinstance(batch, Mapping) or self._ids not in batch:
            found = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise InputError(
                f"AssayCallback(ids={self._ids!r}): the batch has no such key, only {found}; give a function of the "
                "batch, or leave ids= out to name examples by a hash of their content."
            )
        return batch[self._ids]


def _called(module: Module) -> Module:
    """What the training step most likely calls: the one child that holds all parameters, or else the module itself.

    Children of that child are called with tensors whose rows need not be the samples (positions, rotary tables), and
    so is a head behind a backbone, whichever of them the optimizer trains.
    """
    parameters = set(module.parameters())
    inner = [child for child in module.children() if parameters <= set(child.parameters())]
    if len(inner) != 1:
        return module
    return _called(inner[0]) if isinstance(inner[0], (ModuleDict, ModuleList)) else inner[0]


def _of_module(target: Target, module: Module) -> Target:
    """The target with its loss taken of the whole module, in evaluation mode, whichever part of it is trained."""

    def loss(_: Module, batch: Any) -> Tensor:
        training = [part for part in module.modules() if part.training]
        module.eval()
        try:
            return target.loss(module, batch)
        finally:
            for part in training:
                part.training = True

    return Target(target.batches, loss)


def _content_ids(batch: Any) -> list[str]:
    """A hash of every row of the batch's tensors."""
    tensors = [
        x for x in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch) if isinstance(x, Tensor)
    ]
    tensors = [x for x in tensors if x.dim()]
    if not tensors:
        raise InputError("AssayCallback: the batch holds no tensor to name examples by; give ids=.")
    height = len(tensors[0])
    tensors = [x for x in tensors if len(x) == height]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    names = []
    for row in range(height):
        kept = None if mask is None else mask[row].bool()
        rows = [x[row] for x in tensors]
        names.append(content_id([x[kept] if kept is not None and x.shape == kept.shape else x for x in rows]))
    return names


def _groups(metadata: pl.DataFrame | None, group: str) -> dict[Any, str]:
    if metadata is None or group not in metadata.columns:
        raise InputError(f"AssayCallback(group={group!r}): the metadata has no such column.")
    return {id_: str(value) for id_, value in metadata.select("id", group).iter_rows()}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("lightning", "pytorch-lightning"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "?"
