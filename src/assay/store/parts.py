"""Append-only tables: whole parts, and the rows that are not in a part yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import polars as pl

from assay.store.files import write_atomic, write_parquet

Row = TypeVar("Row")
Part = Path | pl.DataFrame  # on disk, or in memory

_PART = re.compile(r"part-(\d{6,})\.parquet")


class PartTable(Generic[Row]):
    """One table of a run that grows.

    Rows wait in a buffer until `flush` turns them into one part: a Parquet file, or a frame where there is no
    folder. A flush that fails leaves the buffer as it was.

    Args:
        folder: Folder of the parts; None keeps them in memory.
        build: Turns buffered entries into a frame.
    """

    def __init__(self, folder: Path | None, build: Callable[[list[Row]], pl.DataFrame]) -> None:
        self._folder = folder
        self._build = build
        # Parts and buffer change hands in one assignment: an interrupt between a part's rename and that
        # assignment makes the next flush overwrite the same part with the same rows and more, so no row is
        # lost or doubled.
        self._held: tuple[tuple[Part, ...], list[Row]] = ((), [])
        self.waiting = 0

    def append(self, entry: Row, rows: int) -> None:
        """Buffer one entry that holds `rows` rows."""
        self._held[1].append(entry)
        self.waiting += rows

    def flush(self) -> None:
        """Make the buffer a part; StoreError if the disk refuses."""
        parts, buffer = self._held
        if not buffer:
            return
        frame = self._build(buffer)
        part: Part = frame
        if self._folder is not None:
            part = part_path(self._folder, len(parts))
            write_atomic(part, partial(write_parquet, frame=frame))
        self._held = ((*parts, part), [])
        self.waiting = 0

    def contents(self) -> list[Part]:
        """Everything so far, in order: the parts, then the buffer as one more."""
        parts, buffer = self._held
        return [*parts, self._build(buffer)] if buffer else list(parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts alone."""
        return self._held[0]


def part_path(folder: Path, number: int) -> Path:
    """File of a part."""
    return folder / f"part-{number:06d}.parquet"


def part_number(path: Path) -> int | None:
    """Number of a part; None for any other file, such as a temporary one of a killed run."""
    match = _PART.fullmatch(path.name)
    return int(match[1]) if match else None


def scan(part: Part | list[Path]) -> pl.LazyFrame:
    """A lazy frame over files or a frame; no name is read as a pattern or as a partition."""
    if isinstance(part, pl.DataFrame):
        return part.lazy()
    return pl.scan_parquet(part, glob=False, hive_partitioning=False)


def stack(parts: Sequence[Part], schema: pl.Schema) -> pl.LazyFrame:
    """Rows of parts of one schema below one another, in order."""
    files = [part for part in parts if isinstance(part, Path)]
    frames = [scan(part) for part in parts if isinstance(part, pl.DataFrame)]
    if files:
        frames.insert(0, scan(files))  # files come before the one buffer, and one scan of all is the fast one
    return pl.concat(frames, how="vertical") if frames else pl.LazyFrame(schema=schema)


def merge(parts: Sequence[Part], schema: pl.Schema) -> pl.LazyFrame:
    """One row per id over parts with a column `id` and any others.

    Where parts disagree about an id, the later one holds, unless it has no value there. A single part is
    taken to have no id twice.
    """
    if not parts:
        return pl.LazyFrame(schema=schema)
    if len(parts) == 1:
        return scan(parts[0])
    rows = pl.concat([scan(part) for part in parts], how="diagonal_relaxed")
    return rows.group_by("id", maintain_order=True).agg(pl.all().drop_nulls().last())
