"""Recording a run, to a folder or in memory."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from assay.errors import AssayWarning, InputError, StoreError
from assay.store.files import check_storable, local_path
from assay.store.header import Header, check_targets
from assay.store.ids import IdKind, id_column, id_series, kind_of_dtype
from assay.store.ledger import Ledger
from assay.store.parts import Mark, common_type
from assay.store.recording import Recording
from assay.store.resume import cut_header, overruled_ids, recorded
from assay.store.schema import STATUSES, check_table_name
from assay.store.tensors import TensorFiles

if TYPE_CHECKING:
    from assay.rows import Folder


class RunWriter:
    """Records the values, the account and the metadata of one run.

    Rows are buffered and reach the disk by `flush`, which the `add_…` methods call by themselves once
    `flush_every` rows wait or `flush_seconds` have passed. A process that is killed loses at most what was
    buffered. A flush that the disk refuses raises `StoreError` *after* the row was taken: all rows stay in
    memory, the ledger shows them, and a later flush writes them.

    Args:
        out: Folder of the run, new or without a run in it; None keeps the run in memory.
        targets: Names of the targets, in the order of the columns of the values.
        info: JSON object that describes the run.
        resume: The step at which a run goes on that the folder holds; rows from that step on are overruled. Without a
            run in the folder, or with None, a new one begins.
        flush_every: Rows that may wait before they are written.
        flush_seconds: Seconds after which waiting rows are written with the next one that is added.

    Raises:
        StoreError: `out` is a file, holds a run already, or cannot be written.
        InputError: Names of targets that are empty or repeated, or `info` that is not JSON.

    Example:
        >>> import numpy as np
        >>> writer = RunWriter(None, targets=["code", "law"], info={"model": "gpt"})
        >>> writer.add_values(0, 0, ["a", "b"], np.array([[0.5, 0.1], [-0.25, 0.2]]))
        >>> writer.add_account(0, "code", 0.25, 0.0, 0.05, 0.3, 0.0)
        >>> writer.ledger.values("law").rows()
        [('b', 0.2, 1), ('a', 0.1, 1)]
        >>> writer.ledger.explained("code")
        1.0
    """

    def __init__(
        self,
        out: str | Path | None,
        targets: Sequence[str],
        info: dict[str, Any] | None = None,
        resume: int | None = None,
        flush_every: int = 100_000,
        flush_seconds: float = 30.0,
    ) -> None:
        path, names = None if out is None else local_path(out), check_targets(targets)
        before = None if path is None or resume is None else recorded(path)
        if before is None or resume is None:
            header = Header(names).merged(info or {})
        else:
            header = cut_header(before, resume, names, info or {})
        self._overruled: dict[tuple[int, int], list[int | str]] = {}
        if before is not None and resume is not None:
            now = (info or {}).get("processes")  # other ones share the samples out in another way
            self._overruled = (
                overruled_ids(before, resume) if before.header.info.get("processes") == now else {}
            )
        self._recording = Recording(path, header, before)
        self._flush_every = self._flush_at = flush_every
        self._flush_seconds = flush_seconds
        self._last_flush = time.monotonic()
        self._metadata_types: dict[str, pl.DataType] = {}
        self._before_flush: list[Callable[[], None]] = []
        self._closed = False

    @property
    def ledger(self) -> Ledger:
        """Ledger of everything that was added and will be added, flushed or not."""
        return Ledger(self._recording)

    @property
    def id_kind(self) -> IdKind | None:
        """Kind of the run's ids; None until the first one is seen."""
        return self._header.ids

    @property
    def gradients(self) -> Folder:
        """Where gradients of the run's samples are recorded."""
        return self._recording.gradients

    @property
    def snapshots(self) -> TensorFiles:
        """Where snapshots of the run are."""
        return self._recording.snapshots

    def add_values(
        self, step: int, micro: int, ids: Sequence[int | str], values: npt.NDArray[np.float64]
    ) -> None:
        """Record the values of one micro-batch.

        Args:
            step: Optimizer step.
            micro: Micro-batch within the step.
            ids: The user's ids, shape [samples].
            values: Positive = lowered the target's loss, shape [samples, targets]; copied.

        Raises:
            InputError: Ids that are no ids, or shapes that do not match; nothing is recorded.
            StoreError: The writer is closed, or a flush failed (the rows are kept).
        """
        self._check_open()
        series = id_series(ids, self._header.ids)
        array = np.array(values, dtype=np.float64)
        expected = (len(series), len(self._header.targets))
        if array.shape != expected:
            raise InputError(
                f"values of shape {list(array.shape)} for {expected[0]} ids and {expected[1]} targets: "
                f"give shape {list(expected)}"
            )
        if not len(series):
            return
        self._fix_ids(series)
        self._compare(operator.index(step), operator.index(micro), series)
        self._recording.append_values(operator.index(step), operator.index(micro), series, array)
        self._flush_if_due()

    def add_account(
        self,
        step: int,
        target: str,
        predicted: float,
        carried: float,
        decayed: float,
        actual: float,
        residual: float,
        status: str = "ok",
    ) -> None:
        """Record how the change of one target's loss at one step is made up.

        Args:
            step: Optimizer step.
            target: Name of the target.
            predicted: Sum of the step's values.
            carried: Part of the momentum that earlier steps left.
            decayed: Part of the weight decay.
            actual: Measured fall of the target's loss.
            residual: What the parts above leave unexplained.
            status: "ok", "nan" (a number of the step is not finite) or "skipped" (the step was not taken).

        Raises:
            InputError: A target or a status that does not exist.
            StoreError: The writer is closed, or a flush failed (the row is kept).
        """
        self._check_open()
        if target not in self._header.targets:
            raise InputError(
                f"no target {target!r}: this run's are {', '.join(map(repr, self._header.targets))}"
            )
        if status not in STATUSES:
            raise InputError(f"no status {status!r}: use one of {', '.join(map(repr, STATUSES))}")
        numbers = (float(predicted), float(carried), float(decayed), float(actual), float(residual))
        self._recording.append_account((operator.index(step), target, *numbers, status))
        self._flush_if_due()

    def add_metadata(self, frame: pl.DataFrame, widen: bool = False) -> None:
        """Record what is known about samples, for `Ledger.by` and `Ledger.metadata`.

        May be called as often as samples turn up: a later value for an id replaces the earlier one, a
        missing value replaces nothing.

        Args:
            frame: A column `id` and any others (domain, source, text).
            widen: A column's type may change between calls to one that some type holds together with what came
                before: whole numbers to fractions, empty lists to lists of strings. Readers get that type.

        Raises:
            InputError: No column `id`, unusable or contradictory ids, or a column whose type Parquet cannot
                hold or changes between calls; nothing is recorded.
            StoreError: The writer is closed, or a flush failed (the rows are kept).
        """
        self._check_open()
        _check_frame(frame, "the metadata")
        if "id" not in frame.columns:
            raise InputError(
                f"the metadata has no column 'id', only {', '.join(map(repr, frame.columns))}: add one"
            )
        frame = _one_row_per_id(frame.with_columns(id_column(frame["id"], self._header.ids)))
        types = {name: dtype for name, dtype in frame.schema.items() if dtype != pl.Null}
        for name, dtype in types.items():
            before = self._metadata_types.get(name, dtype)
            common = common_type(before, dtype) if widen else None
            if dtype != before and common is None:
                raise InputError(
                    f"metadata column {name!r} was {before} and is now {dtype}: cast it to {before}"
                )
            types[name] = dtype if common is None else common
        if frame.is_empty():
            return
        self._metadata_types |= types
        self._fix_ids(frame["id"])
        self._recording.append_metadata(frame)
        self._flush_if_due()

    def add_rows(self, table: str, ids: Sequence[int | str], columns: dict[str, Any]) -> None:
        """Record rows of a table that not every run has: values by token, gradients' norms, what packed rows hold.

        Args:
            table: "tokens", "norms" or "packed".
            ids: The user's ids, shape [rows].
            columns: The other columns, in front of which `id` is put; in every call the same names and types.

        Raises:
            InputError: Ids that are no ids; nothing is recorded.
            StoreError: The writer is closed, or a flush failed (the rows are kept).
        """
        self._check_open()
        series = id_series(ids, self._header.ids)
        self._fix_ids(series)
        self._recording.append_rows(table, pl.DataFrame({"id": series, **columns}))
        self._flush_if_due()

    def add_step(self, table: str, step: float, row: Mapping[str, float | str]) -> None:
        """Record a row of a side table that grows with the run.

        Args:
            table: "curve", "quadrature" or "refresh"; `Ledger.table` shows all of its rows.
            step: Optimizer step; a run that is resumed there or before overrules the row.
            row: The other columns, not the same ones in every call; a row without one of them is null there.

        Raises:
            StoreError: The writer is closed, or a flush failed (the row is kept).
        """
        self._check_open()
        self._recording.append_step(table, {"step": step, **row})
        self._flush_if_due()

    def add_table(self, name: str, frame: pl.DataFrame) -> None:
        """Keep a small side table, such as the coverage; one of the same name is replaced as a whole.

        Args:
            name: Up to 64 lower-case letters, digits, "_" and "-".
            frame: The table; it reaches the disk with the next flush.

        Raises:
            InputError: An unusable name, that of a table which `add_step` has begun, or a column whose type Parquet
                cannot hold.
            StoreError: The writer is closed.
        """
        self._check_open()
        check_table_name(name)
        if self._recording.grows(name):
            raise InputError(f"table {name!r} grows row by row in this run: give this one another name")
        _check_frame(frame, f"table {name!r}")
        self._recording.put_table(name, frame)

    def update_info(self, info: dict[str, Any]) -> None:
        """Merge `info` into the run's info and replace `run.json` as a whole.

        Raises:
            InputError: `info` is not JSON.
            StoreError: The writer is closed, or the disk refuses (the info is kept).
        """
        self._check_open()
        self._recording.header = self._header.merged(info)
        self._write(self._recording.flush_header)

    def values_since(self, mark: Mark | None = None) -> tuple[pl.DataFrame, Mark]:
        """Rows of values that were added since the last look, without reading those before them again.

        Args:
            mark: What the last look returned; None for all rows, those from before a resumed run went on included.

        Returns:
            The rows in the order of recording (columns of `schema.values_schema`), and the mark for the next look.

        Raises:
            StoreError: A part is damaged; it is named.
        """
        rows, now = self._recording.values_since(mark or Mark())
        return self.ledger._collect(rows), now

    def before_flush(self, hand_over: Callable[[], None]) -> None:
        """Have a function called before everything that waits is written, so that it adds what it has kept back.

        Args:
            hand_over: It must give each row once. What it raises comes out of the flush, after the writing.
        """
        self._before_flush.append(hand_over)

    def expect_other_samples(self) -> None:
        """Say nothing where a resumed run takes other samples than the first time: it is meant to."""
        self._overruled = {}

    def flush(self) -> None:
        """Write everything that waits.

        Raises:
            StoreError: The disk refuses. Everything that was recorded is kept, on the disk or in memory.
        """
        # A disk that refuses is asked again after as many rows or seconds more, not with every row.
        self._last_flush = time.monotonic()
        self._flush_at = self._recording.waiting + self._flush_every
        try:
            for hand_over in self._before_flush:
                hand_over()
        finally:
            self._write(self._recording.flush)
        self._flush_at = self._flush_every

    def close(self) -> None:
        """Write everything that waits and mark the run as whole; closing again does nothing.

        Raises:
            StoreError: The disk refuses. The writer stays open: free the disk and close again.
        """
        if self._closed:
            return
        self.flush()
        self._recording.header = replace(self._header, parts=self._recording.parts)
        self._write(self._recording.flush_header)
        self._recording.release()
        self._closed = True

    @property
    def _header(self) -> Header:
        return self._recording.header

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except StoreError as error:
            raise StoreError(
                f"{error}; nothing recorded is lost: {self._recording.waiting} rows wait in memory, "
                "and the next flush() or close() writes them"
            ) from error.__cause__

    def _flush_if_due(self) -> None:
        since = time.monotonic() - self._last_flush
        if self._recording.waiting >= self._flush_at or since >= self._flush_seconds:
            self.flush()

    def _compare(self, step: int, micro: int, ids: pl.Series) -> None:
        """Say once that a resumed run takes other samples than the first time."""
        before = self._overruled.pop((step, micro), None)
        if before is not None and before != ids.to_list():
            self._overruled = {}
            warnings.warn(
                f"step {step} has other samples than when it was recorded before the run was resumed: the data, their "
                "order or the seed is not that of the first time, and this run is not the one that an unbroken "
                "training would have been",
                AssayWarning,
                stacklevel=3,
            )

    def _fix_ids(self, ids: pl.Series) -> None:
        """The first ids decide of which kind all ids of the run are."""
        if self._header.ids is None:
            self._recording.header = replace(self._header, ids=kind_of_dtype(ids.dtype))

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("this run is closed and records nothing more: open a new one with another out=")


def _check_frame(frame: pl.DataFrame, what: str) -> None:
    if not isinstance(frame, pl.DataFrame):
        raise InputError(f"{what} must be a polars DataFrame, not {type(frame).__name__}: convert it")
    check_storable(frame, what)


def _one_row_per_id(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame without repeated rows; InputError if two rows say different things about one id."""
    if frame["id"].is_unique().all():
        return frame
    frame = frame.unique(maintain_order=True)
    repeated = frame.filter(frame["id"].is_duplicated())
    if len(repeated):
        raise InputError(
            f"the metadata has {len(repeated)} contradictory rows, the first for id {repeated['id'][0]!r}: "
            "give every id one row"
        )
    return frame
