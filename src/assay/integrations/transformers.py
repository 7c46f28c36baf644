"""`AssayCallback` for the Trainer of transformers, and for the trainers that are made from it (TRL's SFTTrainer).

A callback of the Trainer is told of steps, not of forward and backward passes. So the callback is *attached*: on this
one trainer it puts itself around `training_step`, which holds the forward and backward pass of one micro-batch and
neither the clipping nor the optimizer's step; around the data collator of the training data, to take the ids before
unused columns are removed; and around `log`. When `trainer.train()` returns or raises, all of it is as before.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from assay.errors import InputError
from assay.integrations import logprob
from assay.integrations.collect import KEY, Collector, Notes, Taken
from assay.integrations.live import LiveValues
from assay.integrations.options import further_methods, of_shapley
from assay.methods import InRunShapley
from assay.methods.base import Method
from assay.run import Run
from assay.store import Ledger
from assay.targets import Target

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed: pip install 'assay[trainer]'") from error

__all__ = ["AssayCallback"]

SAVED_AND_LOADED = ("_save_checkpoint", "_load_best_model")


class AssayCallback(TrainerCallback):  # type: ignore[misc]
    """Values every training example of a Trainer while it trains.

    Gradient accumulation, clipping, mixed precision, `remove_unused_columns`, any data collator, evaluation in between
    and `DistributedDataParallel` need nothing further. The run is closed when `trainer.train()` ends, also by an error
    or Ctrl-C. A training that is resumed from one of the trainer's checkpoints goes on in the same folder.

    Args:
        targets: what examples are valued for: `{name: assay.Target or data set}`, or one of them. A data set is
            collated like the trainer's evaluation data, and its loss is the one that the model itself returns. None
            takes the trainer's `eval_dataset` (each of them, if it is a dict).
        out: folder for the results, or None to keep them in memory.
        id: the column of the training data that names an example. Without it an example is named by a hash of the
            columns that the model gets, which survives shuffling and epochs.
        columns: further columns of the training data to keep as metadata (domain, source, text).
        group: one of `columns`, whose sums are logged while training.
        rows: how many rows of a data set make a target, the first ones; all of them if None. They go through the
            model at every step, so their number decides what the values cost.
        path: see `assay.InRunShapley`.
        momentum: see `assay.InRunShapley`.
        methods: further methods for the same run.
        **options: further ones of `assay.InRunShapley` (`granularity`, `refresh`, `memory`, `target_gradient`, …),
            and of `assay.Run`: `info`, `exclude`, `check`, `strict`, `optimizer_model`, `metadata`, `on_error`,
            `snapshots`.

    Raises:
        InputError: a column to group by that is not kept, an `InRunShapley` among the methods, or (when attached) data
            without columns.

    Example:
        >>> callback = AssayCallback(out="runs/sft", id="url", columns=["domain"], group="domain")
        >>> callback.run is None  # until `callback.attach(trainer)` and `trainer.train()`
        True
    """

    def __init__(
        self,
        targets: Mapping[str, Any] | Any = None,
        out: str | Path | None = None,
        *,
        id: str | None = None,
        columns: Sequence[str] = (),
        group: str | None = None,
        rows: int | None = 32,
        path: str = "left",
        momentum: str = "instant",
        methods: Sequence[Method] = (),
        **options: Any,
    ) -> None:
        if group is not None and group not in columns:
            raise InputError(f"AssayCallback(group={group!r}): name it in columns= too, so that it is kept.")
        self.run: Run | None = None
        self._targets, self._out, self._rows = targets, out, rows
        self._id, self._columns = id, tuple(columns)
        own, self._options = of_shapley(options)
        self._given = {"path": path, "momentum": momentum, **own}
        self._methods = further_methods(methods)
        self._notes, self._grouped = Notes(group), group is not None
        self._trainer: Any = None
        self._live: LiveValues | None = None

    @property
    def ledger(self) -> Ledger:
        """What was recorded so far.

        Raises:
            InputError: training has not begun.
        """
        if self.run is None:
            raise InputError("AssayCallback.ledger: training has not begun; call trainer.train() first.")
        self._notes.hand_over(self.run.writer)
        return self.run.ledger

    def attach(self, trainer: Any) -> AssayCallback:
        """Watch the next `trainer.train()`.

        Args:
            trainer: a `transformers.Trainer` or one of its children, made but not yet training.

        Raises:
            InputError: no Trainer, or attached already.
        """
        for name in ("train", "training_step", "get_train_dataloader", "log", "callback_handler"):
            if not hasattr(trainer, name):
                raise InputError(
                    f"attach(trainer): {type(trainer).__name__} is no Trainer of transformers; "
                    "pass one, or use assay.Run."
                )
        if self._trainer is not None:
            raise InputError("attach(trainer): this callback is attached already; make a new AssayCallback.")
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        replaced: dict[str, Callable[..., Any]] = {
            "train": self._train,
            "training_step": self._training_step,
            "get_train_dataloader": self._get_train_dataloader,
            "log": self._log,
            "_save_checkpoint": self._save_checkpoint,
            "_load_best_model": self._load_best_model,
        }
        for name, replacement in replaced.items():
            _replace(trainer, name, replacement)
        _replace(trainer.callback_handler, "on_train_end", self._train_end)
        return self

    # --- what the Trainer tells its callbacks ---

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Start the run: the model and the optimizer are as they will be trained."""
        trainer = self._trainer
        if trainer is None:
            raise InputError("AssayCallback: call callback.attach(trainer) before trainer.train().")
        if args.n_gpu > 1:
            raise InputError(
                f"AssayCallback follows one device per process, and this one has {args.n_gpu} (nn.DataParallel); start "
                "the training with torchrun, or show it one device."
            )
        # where several processes train together, the wrapper says how they share their gradients
        whole = trainer.accelerator.unwrap_model(model)
        model = trainer.model_wrapped if args.world_size > 1 else whole
        methods: list[Method] = [InRunShapley(self._make_targets(), **self._given)]
        info = {
            "trainer": type(trainer).__name__,
            "arguments": _plain_arguments(args),
            "versions": {
                name: _version(name) for name in ("assay", "torch", "transformers", "trl") if _version(name)
            },
            "seed": args.seed,
            **self._options.get("info", {}),
        }
        if state.global_step:
            info["resumed_from_step"] = state.global_step
        # a step that a loss scaler passed over counts for the trainer as it does for the run
        options = {"resume": state.global_step if state.global_step and self._out else False, **self._options}
        anew = self.run is not None  # with smaller batches, after one ran out of memory
        if anew:
            self._give_up()
            options["resume"] = state.global_step if self._out else False
        options["info"] = info
        options.setdefault("scaler", getattr(self._trainer.accelerator, "scaler", None))
        self.run = Run(model, optimizer, self._out, [*methods, *self._methods], **options)
        self.run.writer.before_flush(functools.partial(self._notes.hand_over, self.run.writer))
        if anew:
            self.run.writer.expect_other_samples()
        self._live = LiveValues(self.run)

    # --- what is put around the trainer's own methods ---

    def _train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            self._detach()
            self._close()

    def _training_step(
        self, original: Callable[..., Tensor], model: Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        assert self.run is not None
        taken = inputs.pop(KEY)
        self._note(taken)
        with logprob.in_plain_torch(), self.run.step(taken.ids):
            return original(model, inputs, *args, **kwargs)

    def _get_train_dataloader(self, original: Callable[[], Any]) -> Any:
        trainer, wanted = self._trainer, [*filter(None, [self._id]), *self._columns]
        collate = trainer.data_collator
        trainer._set_signature_columns_if_needed()
        signature = list(trainer._signature_columns)
        added = [name for name in wanted if name not in signature]
        drop = frozenset(added if trainer.args.remove_unused_columns else ())
        trainer.data_collator = Collector(collate, self._id, self._columns, drop)
        trainer._signature_columns = signature + added
        try:
            return original()
        finally:
            trainer.data_collator, trainer._signature_columns = collate, signature

    def _log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs and self._live is not None and self.run is not None:
            logs.update(self._live.read(self._notes.groups if self._grouped else None))
            self.run.log({key: value for key, value in logs.items() if isinstance(value, int | float)})
        return original(logs, *args, **kwargs)

    def _save_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Before a checkpoint is there, everything recorded up to it is, so that a training can be taken up from it."""
        if self.run is not None:
            self.run.state_dict()
        return original(*args, **kwargs)

    def _load_best_model(self, original: Callable[[], Any]) -> Any:
        self._close()  # before other weights are put in, at which the last step's effect would be measured
        return original()

    def _train_end(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._close()  # likewise: a callback may put in averaged weights
        return original(*args, **kwargs)

    # --- inside ---

    def _give_up(self) -> None:
        """Close the run of an attempt that came to nothing; in a folder, the next one's steps replace its own."""
        self._close()
        self._notes = Notes(self._notes.group)

    def _close(self) -> None:
        if self.run is not None and self._live is not None:  # it is called again where it failed
            self.run.close()
            self._live = None
            with self.run.faults.caught("in writing"):
                self._notes.check()

    def _note(self, taken: Taken) -> None:
        """Keep what is known of a batch; the run takes it over whenever it writes, so that no value is without it."""
        assert self.run is not None
        if self.run.faults.first is not None:
            return
        with self.run.faults.caught("in writing"):
            self._notes.add(taken, self._trainer.state.global_step)
            if self._notes.full:
                self.run.writer.flush()

    def _detach(self) -> None:
        for name in ("train", "training_step", "get_train_dataloader", "log", *SAVED_AND_LOADED):
            self._trainer.__dict__.pop(name, None)  # what lies below is the class's own
        self._trainer.callback_handler.__dict__.pop("on_train_end", None)
        self._trainer.remove_callback(self)

    def _make_targets(self) -> dict[str, Target]:
        wanted = self._trainer.eval_dataset if self._targets is None else self._targets
        if wanted is None:
            raise InputError(
                "AssayCallback(targets=...): there is nothing to value examples for; give a data set or an "
                "assay.Target, or the trainer an eval_dataset."
            )
        if not isinstance(wanted, Mapping):
            wanted = {"eval": wanted}
        with torch.random.fork_rng():  # a loader draws a seed for its workers
            return {
                name: value if isinstance(value, Target) else self._target(name, value)
                for name, value in wanted.items()
            }

    def _target(self, name: str, dataset: Any) -> Target:
        trainer, left = self._trainer, self._rows
        batches: list[Any] = []
        with _one_at_a_time(trainer), _undivided(trainer):
            for batch in trainer.get_eval_dataloader(_first(dataset, left)):
                batch = trainer._prepare_inputs(batch)
                height = next(len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim())
                if left is not None and height > left:
                    batch = {key: _head(value, height, left) for key, value in batch.items()}
                batches.append(dict(batch))
                left = None if left is None else left - min(height, left)
                if left == 0:
                    break
        return Target(batches, functools.partial(_own_loss, name))


def _replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Put something around a method, of this one object."""
    if (original := getattr(owner, name, None)) is not None:
        setattr(owner, name, functools.wraps(original)(functools.partial(replacement, original)))


@contextlib.contextmanager
def _one_at_a_time(trainer: Any) -> Iterator[None]:
    """No worker processes for the few batches of a target."""
    workers, prefetch = trainer.args.dataloader_num_workers, trainer.args.dataloader_prefetch_factor
    persistent = trainer.args.dataloader_persistent_workers
    trainer.args.dataloader_num_workers, trainer.args.dataloader_prefetch_factor = 0, None
    trainer.args.dataloader_persistent_workers = False
    try:
        yield
    finally:
        trainer.args.dataloader_num_workers, trainer.args.dataloader_prefetch_factor = workers, prefetch
        trainer.args.dataloader_persistent_workers = persistent


@contextlib.contextmanager
def _undivided(trainer: Any) -> Iterator[None]:
    """Every process gets all rows of a target; which of them goes through which of their models, the run decides."""
    accelerator = trainer.accelerator
    if accelerator.num_processes > 1:
        accelerator.prepare = lambda loader, **_: loader
    try:
        yield
    finally:
        accelerator.__dict__.pop("prepare", None)


def _own_loss(name: str, model: Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a model of transformers returns for a batch with labels."""
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        raise InputError(
            f"target {name!r}: the model returned no loss for its batches (labels missing?); give an "
            "assay.Target(batches, loss) instead of a data set."
        )
    return torch.as_tensor(loss)


def _first(dataset: Any, rows: int | None) -> Any:
    """The first rows of a data set, where it can tell: a collator may make one row of several of them."""
    if rows is not None and hasattr(dataset, "select") and hasattr(dataset, "__len__"):
        return dataset.select(range(min(rows, len(dataset))))
    if rows is not None and isinstance(dataset, list):
        return dataset[:rows]
    return dataset.take(rows) if rows is not None and hasattr(dataset, "take") else dataset


def _head(value: Any, height: int, rows: int) -> Any:
    """The first rows of what has a row per example."""
    return value[:rows] if isinstance(value, Tensor) and value.dim() and len(value) == height else value


def _plain_arguments(args: Any) -> dict[str, Any]:
    """Arguments of the Trainer that are plain values."""
    plain = (str, int, float, bool, type(None))
    given = itertools.chain(args.to_dict().items())
    return {key: value for key, value in given if isinstance(value, plain) and "token" not in key}


def _version(name: str) -> str | None:
    return getattr(sys.modules.get(name), "__version__", None)
