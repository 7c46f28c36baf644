"""The tables of a run that is being recorded, in its folder or in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from assay.errors import StoreError
from assay.store.cuts import end_of, stack_below, stepwise
from assay.store.files import frame_file, verify_frame, write_error, write_frame
from assay.store.folder import RunFolder, gradients_folder
from assay.store.header import NAME, Header
from assay.store.lock import WriteLock
from assay.store.parts import Entry, Mark, PartTable, merge
from assay.store.schema import (
    ABOUT_SAMPLES,
    ACCOUNT,
    DETAILS,
    PARTED,
    SHARDS,
    STEPWISE,
    TABLES,
    metadata_schema,
    value_column,
    values_schema,
)
from assay.store.tensors import TensorFiles, snapshot_files

if TYPE_CHECKING:
    from assay.rows import Folder

# step, micro, ids [samples], values [samples, targets]
ValuesEntry = tuple[int, int, pl.Series, npt.NDArray[np.float64]]
# the columns of schema.ACCOUNT
AccountEntry = tuple[int, str, float, float, float, float, float, str]


class Recording:
    """Appends to the tables of a run, and reads them back whether they have reached the disk or not.

    Setting `header` takes effect at once for readers and on the disk with the next flush.

    Args:
        out: Folder of the run, made here; None for memory.
        header: The run's header.
        before: What the folder holds, if a run goes on there.

    Raises:
        StoreError: `out` is a file, holds a run already, cannot be written, or another process writes there.
    """

    def __init__(self, out: Path | None, header: Header, before: RunFolder | None = None) -> None:
        self.header = self._written_header = header
        self.path = out
        self._before = {} if before is None else before.parts
        self._lock: WriteLock | None = None
        if before is not None:
            self._lock = WriteLock(before.path)
            header.write(before.path)
        elif out is not None:
            self._lock = _create(out, header)
        self._values = self._table("values", self._build_values)
        self._account = self._table("account", _build_account)
        self._metadata = self._table("metadata", self._build_metadata)
        self._tables: dict[str, PartTable[Any]] = {
            "values": self._values,
            "account": self._account,
            "metadata": self._metadata,
        }
        for names, build in _OPTIONAL:
            self._tables |= {name: self._table(name, build) for name in names if name in self._before}
        self._side: dict[str, _SideTable] = {}
        for name, path in ({} if before is None else before.side_files).items():
            self._side[name] = _SideTable(pl.read_parquet(path), _number(path), path)

    @cached_property
    def gradients(self) -> Folder:
        """Where gradients of the run's samples are recorded."""
        return gradients_folder(self.path)

    @cached_property
    def snapshots(self) -> TensorFiles:
        """Where snapshots of the run are."""
        return snapshot_files(self.path)

    def append_values(self, step: int, micro: int, ids: pl.Series, values: npt.NDArray[np.float64]) -> None:
        """Buffer one micro-batch: ids [samples], values [samples, targets]."""
        self._values.append((step, micro, ids, values), len(ids))

    def append_account(self, row: AccountEntry) -> None:
        """Buffer one row of the account."""
        self._account.append(row, 1)

    def append_metadata(self, frame: pl.DataFrame) -> None:
        """Buffer metadata that has no id twice."""
        self._metadata.append(frame, len(frame))

    def append_rows(self, table: str, frame: pl.DataFrame) -> None:
        """Buffer rows of a table that not every run has, one of `schema.DETAILS`; its first rows fix its columns."""
        if table not in self._tables:
            self._tables[table] = self._table(table, _build_rows)
        self._tables[table].append(frame, len(frame))

    def append_step(self, table: str, row: Mapping[str, Any]) -> None:
        """Buffer a row of one of `schema.STEPWISE`, with a `step`; a later row may have other columns."""
        if table not in self._tables:
            self._tables[table] = self._table(table, _build_steps)
        if self._tables[table].empty:
            for kept in self._kept_whole(table):
                self._tables[table].append(kept, 1)
        self._tables[table].append(row, 1)

    def grows(self, table: str) -> bool:
        """Whether a side table has got rows step by step."""
        return table in STEPWISE and table in self._tables and not self._tables[table].empty

    def put_table(self, name: str, frame: pl.DataFrame) -> None:
        """Set a side table."""
        before = self._side.get(name)
        self._side[name] = _SideTable(frame.clone()) if before is None else before.replaced(frame.clone())

    @property
    def waiting(self) -> int:
        """Number of buffered rows."""
        return sum(table.waiting for table in self._tables.values())

    @property
    def parts(self) -> dict[str, int]:
        """Number of parts of each table."""
        return {name: table.end for name, table in self._tables.items()}

    def flush(self) -> None:
        """Write all that waits; StoreError if the disk refuses, with the rest still waiting."""
        self.flush_header()  # first, since it says of which kind the ids of the parts are
        for name in sorted(self._tables, key=lambda name: name not in ABOUT_SAMPLES):
            table = self._tables[name]
            if name not in PARTED and table.waiting and not table.end:
                self._make_folder(name)
            table.flush()
        if self.path is not None:
            for name, side in self._side.items():
                side.write(self.path / TABLES, name)

    def flush_header(self) -> None:
        """Write `run.json` if it changed."""
        header = self.header
        if self.path is not None and header != self._written_header:
            header.write(self.path)
        self._written_header = header

    def release(self) -> None:
        """Nothing more is written: another process may go on here."""
        if self._lock is not None:
            self._lock.release()

    def values(self) -> pl.LazyFrame:
        """Rows of values."""
        schema = values_schema(self.header.targets, self.header.ids)
        return stack_below(self._values.contents(), "values", self.header.cuts, schema)

    def values_since(self, mark: Mark) -> tuple[pl.LazyFrame, Mark]:
        """Rows of values behind a mark, and the mark behind them."""
        parts, skip, now = self._values.since(mark)
        schema = values_schema(self.header.targets, self.header.ids)
        # only parts that were there when the run went on are cut, and before those no row is skipped
        return stack_below(parts, "values", self.header.cuts, schema).slice(skip), now

    def account(self) -> pl.LazyFrame:
        """Rows of the account."""
        return stack_below(self._account.contents(), "account", self.header.cuts, ACCOUNT)

    def metadata(self) -> pl.LazyFrame:
        """Metadata, one row per id."""
        return merge(self._metadata.contents(), metadata_schema(self.header.ids))

    def rows(self, table: str) -> pl.LazyFrame | None:
        """Rows of one of `schema.DETAILS`; None if the run has none."""
        contents = self._tables[table].contents() if table in self._tables else []
        return stack_below(contents, table, self.header.cuts, pl.Schema()) if contents else None

    def side(self) -> dict[str, pl.LazyFrame]:
        """Side tables by name, those that grow with the steps among them."""
        whole = {name: table.frame.lazy() for name, table in self._side.items()}
        grown = {name: self._tables[name].contents() for name in STEPWISE if name in self._tables}
        return whole | stepwise(grown, self.header.cuts)

    def verify(self) -> None:
        """Compare every part with its checksum; StoreError names the first one that is damaged."""
        for table in self._tables.values():
            for part in table.parts:
                if isinstance(part, Path):
                    verify_frame(part)

    def _make_folder(self, table: str) -> None:
        """Before the first part of a table that not every run has; StoreError if the disk refuses."""
        folder = self._folder(table)
        if folder is not None:
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise write_error(folder, error) from error

    def _kept_whole(self, table: str) -> list[dict[str, Any]]:
        """The rows that count of a table which the run that goes on here, of an older assay, kept as a whole."""
        before = self._side.get(table)
        if before is None:
            return []
        frame = before.frame
        if self.header.cuts and "step" in frame.columns:
            frame = frame.filter(pl.col("step") < self.header.cuts[-1].step)
        return frame.rows(named=True)

    def _table(self, name: str, build: Callable[[list[Entry]], pl.DataFrame]) -> PartTable[Entry]:
        parts = self._before.get(name, [])
        return PartTable(self._folder(name), build, parts, end_of(parts))

    def _folder(self, table: str) -> Path | None:
        return None if self.path is None else self.path / table

    def _build_values(self, entries: list[ValuesEntry]) -> pl.DataFrame:
        steps, micros, ids, values = zip(*entries, strict=True)
        rows = [len(series) for series in ids]
        stacked = np.concatenate(values)  # [rows, targets]
        return pl.DataFrame(
            {"step": np.repeat(steps, rows), "micro": np.repeat(micros, rows), "id": pl.concat(ids)}
            | {value_column(target): stacked[:, k] for k, target in enumerate(self.header.targets)},
            schema=values_schema(self.header.targets, self.header.ids),
        )

    def _build_metadata(self, frames: list[pl.DataFrame]) -> pl.DataFrame:
        return merge(frames, metadata_schema(self.header.ids)).collect()


@dataclass
class _SideTable:
    """A side table and what of it lies on the disk."""

    frame: pl.DataFrame
    number: int = 0  # how often it was replaced; the file with the highest number is the table
    written: Path | None = None
    older: tuple[Path, ...] = ()

    def replaced(self, frame: pl.DataFrame) -> _SideTable:
        older = self.older if self.written is None else (*self.older, self.written)
        return _SideTable(frame, self.number + 1, None, older)

    def write(self, folder: Path, name: str) -> None:
        if self.written is None:
            self.written = write_frame(folder, name, self.number, self.frame)
        for path in self.older:
            with suppress(OSError):  # readers take the newest, whatever else is left
                path.unlink()
        self.older = ()


def _number(path: Path) -> int:
    file = frame_file(path)
    return 0 if file is None else file.number


def _build_rows(frames: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames, how="vertical")


def _build_steps(rows: list[Mapping[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, infer_schema_length=None
    )  # the columns of all rows, also of those that come late


# the tables that not every run has, and what makes their entries a frame
_OPTIONAL: tuple[tuple[tuple[str, ...], Callable[[list[Any]], pl.DataFrame]], ...] = (
    (DETAILS, _build_rows),
    (STEPWISE, _build_steps),
)


def _build_account(rows: list[AccountEntry]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=ACCOUNT, orient="row")


def _create(out: Path, header: Header) -> WriteLock:
    """Make the folder of a new run; StoreError, and nothing left behind, if that cannot be."""
    if os.path.exists(out) and not os.path.isdir(out):  # pathlib's own raise where a folder cannot be read
        raise StoreError(f"out={str(out)!r} is a file: name a folder")
    made: list[Path] = []
    lock: WriteLock | None = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = WriteLock(out)
        _check_free(out, lock)
        for name in (*PARTED, TABLES):
            (out / name).mkdir()  # of two writers that start at once, one fails here
            made.append(out / name)
        header.write(out)
    except OSError as error:  # a StoreError is one, too
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if lock is not None:
            lock.release()
        if isinstance(error, FileExistsError):
            raise _occupied(out) from error
        raise error if isinstance(error, StoreError) else write_error(out, error) from error
    return lock


def _check_free(out: Path, lock: WriteLock) -> None:
    """StoreError if the folder holds a run; what one left that was killed before it had begun is removed."""
    there = [
        name for name in (NAME, *PARTED, *DETAILS, *STEPWISE, TABLES, SHARDS) if os.path.exists(out / name)
    ]
    begun = lock.sure and NAME not in there and all(name in (*PARTED, TABLES) for name in there)
    if there and not (begun and not any(any((out / name).iterdir()) for name in there)):
        raise _occupied(out)
    for name in there:
        (out / name).rmdir()


def _occupied(out: Path) -> StoreError:
    return StoreError(f"{out} already holds a run: choose another out=, or delete that folder to record anew")
