"""What a run left behind for its replay: the snapshots, and the log of every step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from assay.errors import AssayWarning, InputError, StoreError
from assay.snapshots import LOG, STATE, RandomState
from assay.store.ids import id_series
from assay.store.tensors import TensorFiles

__all__ = ["StepRecord", "Trajectory"]


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step saw.

    Args:
        step: its number.
        ids: of each micro-batch.
        random: state of the generators at the start of each micro-batch.
        groups: options of every parameter group.
        norm: of the gradient that the optimizer received.
        scales: by group, what the gradient was multiplied by since `backward()`.
        gap: how far that was from being a scale.
        skipped: whether the step was not taken.
    """

    step: int
    ids: Sequence[Sequence[int | str]]
    random: Sequence[RandomState]
    groups: Sequence[Mapping[str, Any]]
    norm: float
    scales: Sequence[float]
    gap: float
    skipped: bool


class Trajectory:
    """The snapshots and the log of a run.

    Args:
        files: where the run put them; None where it took none.

    Raises:
        StoreError: there are none, or the end of the log is missing.
        InputError: the optimizer took a step that the run did not see.

    Attributes:
        snapshots: the steps that can be started from; the last is the end.
        records: by step.
    """

    def __init__(self, files: TensorFiles | None) -> None:
        found = files.numbers(STATE) if files is not None else []
        if files is None or not found:
            raise StoreError(
                "this run has no snapshots to replay it from: train with assay.Run(..., snapshots='auto')"
            )
        self.files, self.snapshots = files, found
        self.records: dict[int, StepRecord] = {}
        for number in files.numbers(LOG):
            part = files.read(LOG, number)
            for row in part["steps"]:
                if row["unattended"]:
                    raise InputError(
                        f"before step {row['step']} the optimizer took a step outside of run.step(ids): a run that was "
                        "not seen whole cannot be replayed."
                    )
                self.records[row["step"]] = _record(row, part["random"])
        missing = [t for t in range(self.start, self.end) if t not in self.records]
        if missing:
            self._start_behind(missing[-1])

    def _start_behind(self, step: int) -> None:
        """Leave out what cannot be replayed: a run that was killed and resumed has steps that nobody logged."""
        behind = [number for number in self.snapshots if number > step]
        if len(behind) < 2:
            raise StoreError(f"the snapshots' log lacks step {step}: put its file back, or train anew")
        warnings.warn(
            f"the snapshots' log lacks step {step} (was the run killed there, and resumed?): only the steps from "
            f"{behind[0]} on can be replayed",
            AssayWarning,
            stacklevel=3,
        )
        self.snapshots = behind
        self.records = {t: record for t, record in self.records.items() if t >= behind[0]}

    @property
    def start(self) -> int:
        """The first step that can be replayed."""
        return self.snapshots[0]

    @property
    def end(self) -> int:
        """The number of steps at the last snapshot: of the whole run, unless it was killed."""
        return self.snapshots[-1]

    def load(self, step: int) -> dict[str, Any]:
        """The snapshot of that step, the caller's own."""
        content: dict[str, Any] = self.files.read(STATE, step)
        return copy.deepcopy(content) if self.files.folder is None else content

    def segments(self, first: int) -> list[tuple[int, int]]:
        """Stretches from one snapshot to the next, down to the one that holds step `first`, the last one first."""
        pairs = list(zip(self.snapshots, self.snapshots[1:], strict=False))
        return [pair for pair in reversed(pairs) if pair[1] > first]

    def rows(self, steps: Iterable[int] | None = None) -> pl.DataFrame:
        """Frame `step`, `id`: a row per sample and micro-batch, in order."""
        chosen = [self.records[t] for t in (sorted(self.records) if steps is None else steps)]
        chosen = [record for record in chosen if not record.skipped]
        numbers = [r.step for r in chosen for ids in r.ids for _ in ids]
        ids = [i for r in chosen for micro in r.ids for i in micro]
        column = id_series(ids, None) if ids else pl.Series([], dtype=pl.Int64)
        return pl.DataFrame({"step": pl.Series(numbers, dtype=pl.Int64), "id": column})


def _record(row: Mapping[str, Any], states: Sequence[RandomState]) -> StepRecord:
    random = [states[i] for i in row["random"]]
    return StepRecord(
        row["step"], row["ids"], random, row["groups"], row.get("norm", 0.0), row.get("scales", []),
        row.get("gap", 0.0), row["skipped"],
    )  # fmt: skip
