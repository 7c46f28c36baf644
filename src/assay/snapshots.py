"""Snapshots of a run while it trains, so that it can be replayed: what the adjoint starts each segment from.

A *snapshot* holds what step t starts from: weights, buffers and the optimizer's state. The *log* between two snapshots
holds what else a step saw and nobody could guess later: the ids, the options of every parameter group (learning rates
as the schedule left them), the random-number state of every micro-batch (where it differs from the one before), and
the norm of the gradient that the optimizer received, by which a replay is told from another run.

With snapshots every k steps a replay holds k steps at a time: memory for k states, disk for T/k. By default k follows
√T without knowing T: it doubles whenever t reaches 4k², and the snapshots between are deleted, so that √T to 2√T
remain. A log of the whole run always remains.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from assay.errors import InputError
from assay.methods.base import Context, Demand, MicroBatch
from assay.store.tensors import TensorFiles

__all__ = ["RandomState", "SnapshotSession", "Snapshots", "snapshot_settings"]

STATE, LOG = "state", "log"
RandomState = dict[str, Any]


@dataclass(frozen=True)
class Snapshots:
    """When to take snapshots.

    Args:
        every: steps between two; None follows the square root of the run's length.
        budget: bytes that they may take at most; the distance doubles where it is not enough.

    Raises:
        InputError: a distance or a budget that is none.

    Example:
        >>> Snapshots(every=100)
        Snapshots(every=100, budget=None)
    """

    resumes: ClassVar[bool] = True

    every: int | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("budget", self.budget)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"Snapshots({name}={value!r}) must be a whole number from 1 on.")

    def kept(self, steps: int, bytes_each: int = 0) -> tuple[int, ...]:
        """The steps whose snapshots remain after so many.

        Example:
            >>> Snapshots().kept(30)
            (0, 4, 8, 12, 16, 20, 24, 28, 30)
        """
        k, found = self.every or 1, list[int]()
        for step in range(steps + 1):
            if step % k == 0 or step == steps:
                k = self.next_distance(k, step, bytes_each)
                found = [number for number in [*found, step] if number % k == 0 or number == step]
        return tuple(found)

    def distance(self, step: int, bytes_each: int = 0) -> int:
        """The distance between snapshots when this step begins.

        Example:
            >>> Snapshots().distance(30), Snapshots(every=3).distance(30)
            (4, 3)
        """
        k = past = self.every or 1
        while past < step:
            k = self.next_distance(k, past, bytes_each)
            past += k - past % k
        return k

    @property
    def target_names(self) -> Sequence[str]:
        """Snapshots value nothing."""
        return []

    def describe(self) -> Mapping[str, Any]:
        """The settings, for the run's information."""
        return {"method": "snapshots", "every": self.every, "budget": self.budget}

    def attach(self, context: Context) -> SnapshotSession:
        """Start in a run.

        Raises:
            InputError: several processes train together.
        """
        if context.processes.size > 1:
            raise InputError(
                "Run(snapshots=...): a run of several processes cannot be replayed; leave them out."
            )
        optimizer = context.optimizer.optimizer
        return SnapshotSession(self, context.model, optimizer, context.writer.snapshots)

    def next_distance(self, k: int, steps: int, bytes_each: int) -> int:
        """The distance once `steps` steps are done, `k` being the present one; a multiple of it by a power of 2."""
        while self.every is None and steps >= 4 * k * k:
            k *= 2
        while self.budget is not None and k <= steps and (steps // k + 2) * bytes_each > self.budget:
            k *= 2
        return k


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def snapshot_settings(value: object) -> Snapshots | None:
    """Settings from what `Run(snapshots=...)` takes.

    Args:
        value: None or False for none, True or "auto" for the default, a number of steps, a budget such as "2 GB", or
            the settings themselves.

    Raises:
        InputError: anything else.

    Example:
        >>> snapshot_settings(50), snapshot_settings("2 GB"), snapshot_settings("auto")
        (Snapshots(every=50, budget=None), Snapshots(every=None, budget=2000000000), Snapshots(every=None, budget=None))
    """
    if value is None or value is False:
        return None
    if value is True or value == "auto":
        return Snapshots()
    if isinstance(value, Snapshots):
        return value
    if isinstance(value, int):
        return Snapshots(every=value)
    budget = _bytes(value)
    if budget is None:
        raise InputError(
            f"snapshots={value!r} is not known; give 'auto', a number of steps, or a budget as '2 GB'."
        )
    return Snapshots(budget=budget)


def bytes_of(value: int | str, what: str) -> int:
    """A size in bytes.

    Args:
        value: a number, or such as "2 GB".
        what: the argument that it was given for, for the error.

    Raises:
        InputError: neither.

    Example:
        >>> bytes_of("2 GB", "graphs"), bytes_of(0, "graphs")
        (2000000000, 0)
    """
    size = value if isinstance(value, int) and not isinstance(value, bool) else _bytes(value)
    if size is None or size < 0:
        raise InputError(f"{what}: {value!r} is no size; give a number of bytes, or such as '2 GB'.")
    return size


def _bytes(value: object) -> int | None:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?b)\s*", str(value).lower())
    return int(float(match[1]) * _UNITS[match[2]]) if match and isinstance(value, str) else None


class SnapshotSession:
    """Takes the snapshots of one run and keeps its log.

    Args:
        settings: when.
        model: that is trained.
        optimizer: that trains it.
        files: where they go.

    Raises:
        StoreError: from any method, where the disk refused.
    """

    def __init__(self, settings: Snapshots, model: Module, optimizer: Optimizer, files: TensorFiles) -> None:
        self.settings, self.model, self.optimizer, self.files = settings, model, optimizer, files
        self.distance = settings.every or 1
        self.seconds = 0.0
        self._bytes_each = 0
        self._next = 0
        self._first: int | None = None  # where this process took the run up
        self._pinned = (
            0  # the snapshot that stays, whatever the distance: where a run may be, or was, taken up
        )
        self._kept: set[int] = set()  # the snapshots that there are; of the writing thread, once the run goes
        self._steps: list[dict[str, Any]] = []
        self._random: list[RandomState] = []
        self._open: list[int] = []  # of each micro-batch of the open step, where its random state is
        self._unattended = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="assay-snapshots")
        self._writing: Future[None] | None = None

    def begin_step(self, step: int) -> Demand:
        """Take a snapshot if one is due, and watch the micro-batches' random numbers."""
        started = time.perf_counter()
        self._next, self._open = step, []
        if self._first is None:
            self._resume(step)
        if step % self.distance == 0 or step == self._first:
            self._write(step)
        self.seconds += time.perf_counter() - started
        return Demand(before=self._see_random_state)

    def _resume(self, step: int) -> None:
        """The run starts, or goes on, here: what lies behind it is of a past that did not happen."""
        self._first = self._pinned = step
        self.distance = self.settings.distance(step)
        for number in self.files.numbers(STATE):
            if number >= step:
                self.files.delete(STATE, number)
            else:
                self._kept.add(number)
        for number in self.files.numbers(LOG):
            if number >= step:
                self.files.delete(LOG, number)

    def _see_random_state(self) -> None:
        state = random_state(self.model)
        if not self._random or not same_random_state(self._random[-1], state):
            self._random.append(state)
        self._open.append(len(self._random) - 1)

    def before_update(self, step: int, batches: Sequence[MicroBatch], scale: Tensor, gap: Tensor) -> None:
        """Log the step: what it saw, and the gradient that the optimizer is about to receive."""
        groups = self.optimizer.param_groups
        row = self._log(step, [list(batch.ids) for batch in batches], False)
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        row |= {"groups": [_options(group) for group in groups], "norm": norm_of(gradients)}
        row |= {"scales": scale, "gap": gap}

    def skipped(self, step: int) -> None:
        """The step's gradients were thrown away: it is logged as one that moved nothing."""
        self._log(step, [[] for _ in self._open], True)

    def unattended_update(self) -> None:
        """The optimizer takes a step that nobody showed: the log says so."""
        self._unattended = True

    def settle(self) -> None:
        """A checkpoint is about to be saved: a run that goes on from it finds a snapshot, and the log up to it."""
        if self._first is not None:  # before the first step nothing says which one comes next
            self._pinned = self._next
            self._write(self._next)
            self._wait()

    def flush(self) -> None:
        """Nothing waits but what belongs to the next snapshot."""

    def close(self) -> None:
        """The end of the run: what it ended with is a snapshot too."""
        if self._first is not None:
            self._write(self._next)
        self._wait()
        self._pool.shutdown()

    def explained(self) -> Mapping[str, float]:
        """Snapshots explain nothing."""
        return {}

    def _log(self, step: int, ids: list[list[int | str]], skipped: bool) -> dict[str, Any]:
        row = {
            "step": step,
            "ids": ids,
            "random": self._open,
            "skipped": skipped,
            "unattended": self._unattended,
        }
        self._steps.append(row)
        self._next, self._unattended = step + 1, False
        return row

    def _write(self, step: int) -> None:
        """Hand a snapshot and the log since the last one to the writing thread; one waits at most."""
        self._wait()
        content = self._content(step)
        log = {"steps": [_host(row) for row in self._steps], "random": self._random}
        first = self._steps[0]["step"] if self._steps else None
        self._steps, self._random = [], []
        # Decided in this thread and from what is known in it, so that a run takes the same snapshots every time.
        self.distance = self.settings.next_distance(self.distance, step, 0)
        self._writing = self._pool.submit(self._put, step, content, first, log)
        if self.settings.budget is not None:  # what they take is known once they are written
            self._wait()
            self.distance = self.settings.next_distance(self.distance, step, self._bytes_each)
        self._pool.submit(self._thin, step, self.distance, self._pinned)

    def _put(self, step: int, content: Any, first: int | None, log: Any) -> None:
        if first is not None:
            self.files.write(LOG, first, log)  # first, so that no snapshot stands without the way to it
        self._bytes_each = max(self._bytes_each, self.files.write(STATE, step, content))
        self._kept.add(step)

    def _thin(self, step: int, distance: int, pinned: int) -> None:
        """Delete what stands between; if the snapshot was refused, the one before is kept with all others."""
        if step in self._kept:
            for number in sorted(self._kept):
                if number % distance and number not in (step, pinned):
                    self.files.delete(STATE, number)
                    self._kept.remove(number)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _content(self, step: int) -> dict[str, Any]:
        """Copies, free of the training that goes on."""
        return {
            "step": step,
            "weights": {name: _copy(p) for name, p in self.model.named_parameters()},
            "buffers": {name: _copy(b) for name, b in self.model.named_buffers()},
            "training": [module.training for module in self.model.modules()],
            "optimizer": _copied(self.optimizer.state_dict()),
        }


def random_state(model: Module) -> RandomState:
    """The state of every generator that a training step may draw from."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": {i: torch.cuda.get_rng_state(i) for i in devices},
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, rest)],
    }


def set_random_state(state: RandomState) -> None:
    """Put every generator into that state."""
    torch.set_rng_state(state["torch"])
    for device, found in state["cuda"].items():
        torch.cuda.set_rng_state(found, device)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, numbers.numpy().astype(np.uint32), int(position), int(has_gauss), cached))


def same_random_state(a: RandomState, b: RandomState) -> bool:
    """Whether nothing was drawn between the two."""
    return (
        torch.equal(a["torch"], b["torch"])
        and all(torch.equal(x, b["cuda"][i]) for i, x in a["cuda"].items())
        and a["python"] == b["python"]
        and a["numpy"][2:] == b["numpy"][2:]
        and torch.equal(a["numpy"][1], b["numpy"][1])
    )


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """0-dim: the norm of all of them, in float32 at least; it stays on its device."""
    if not gradients:
        return torch.zeros(())
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    total: Tensor = torch.stack(torch._foreach_norm(list(gradients), 2, wide)).norm()
    return total


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options, its parameters aside; tensors are copied, since a schedule may change them in place."""
    options: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, Tensor):
            options[name] = value.detach().clone()
        elif isinstance(value, (bool, int, float, str, tuple, list)) and name not in (
            "params",
            "param_names",
        ):
            options[name] = value
    return options


def _host(row: dict[str, Any]) -> dict[str, Any]:
    """A step's row with plain numbers in it."""
    row = {**row, "groups": [{k: _plain(v) for k, v in group.items()} for group in row.get("groups", [])]}
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _copy(value)
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v) for v in value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else None
