"""Append-only tables: whole parts, and the rows that are not in a part yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import polars as pl

from assay.store.files import scan_frames, write_frame

Entry = TypeVar("Entry")
Part = Path | pl.DataFrame  # on disk, or in memory

PART = "part"


class Mark(NamedTuple):
    """How far a reader of a table that grows has come.

    Args:
        parts: Parts that it has read whole.
        sealed: Whether it has read a frame that the disk had refused.
        entries: Of the buffer, how many entries.
        rows: Behind those parts, how many rows.
    """

    parts: int = 0
    sealed: bool = False
    entries: int = 0
    rows: int = 0


class PartTable(Generic[Entry]):
    """One table of a run that grows.

    Entries wait in a buffer until `flush` seals them into a frame and makes that frame the next part: a
    Parquet file, or the frame itself where there is no folder. A frame that the disk refuses stays sealed
    and is offered again.

    Args:
        folder: Folder of the parts; None keeps them in memory.
        build: Turns buffered entries into a frame.
        parts: Those that are there already.
        number: That the first new part gets.
    """

    def __init__(
        self,
        folder: Path | None,
        build: Callable[[list[Entry]], pl.DataFrame],
        parts: Sequence[Part] = (),
        number: int = 0,
    ) -> None:
        self._folder = folder
        self._build = build
        self._before = number - len(parts)  # numbers that no part has
        # Parts, sealed frame and buffer change in one assignment. An interrupt just before it makes the next
        # flush write the same frame under the same name again, so that no row is ever lost or stored twice.
        self._held: tuple[tuple[Part, ...], pl.DataFrame | None, list[Entry]] = (tuple(parts), None, [])
        self._buffered = 0

    def append(self, entry: Entry, rows: int) -> None:
        """Buffer one entry that holds `rows` rows."""
        self._held[2].append(entry)
        self._buffered += rows

    def flush(self) -> None:
        """Make all that waits parts; StoreError if the disk refuses."""
        while self._held[1] is not None or self._held[2]:
            parts, sealed, buffer = self._held
            if sealed is None:
                self._held = (parts, self._build(buffer), [])
                self._buffered = 0
                continue
            part: Part = sealed
            if self._folder is not None:
                part = write_frame(self._folder, PART, self._before + len(parts), sealed)
            self._held = ((*parts, part), None, buffer)

    def contents(self) -> list[Part]:
        """Everything so far, in order, whether it is a part yet or not."""
        parts, sealed, buffer = self._held
        return [*parts, *([] if sealed is None else [sealed]), *([self._build(buffer)] if buffer else [])]

    def since(self, mark: Mark) -> tuple[list[Part], int, Mark]:
        """What holds the rows behind a mark, how many of its first rows lie before the mark, and the mark now."""
        parts, sealed, buffer = self._held
        if (len(parts), sealed is not None) == (mark.parts, mark.sealed):  # only the buffer has grown
            found: list[Part] = []
            skip, rows, fresh = 0, mark.rows, buffer[mark.entries :]
        else:
            found = [*parts[mark.parts :], *([] if sealed is None else [sealed])]
            skip, rows, fresh = mark.rows, 0 if sealed is None else len(sealed), buffer
        if fresh:
            built = self._build(fresh)
            found.append(built)
            rows += len(built)
        return found, skip, Mark(len(parts), sealed is not None, len(buffer), rows)

    @property
    def empty(self) -> bool:
        """Whether there is nothing so far, in a part or waiting."""
        parts, sealed, buffer = self._held
        return not parts and sealed is None and not buffer

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts alone."""
        return self._held[0]

    @property
    def end(self) -> int:
        """The number that the next part gets."""
        return self._before + len(self._held[0])

    @property
    def waiting(self) -> int:
        """Number of rows that are in no part yet."""
        sealed = self._held[1]
        return self._buffered + (0 if sealed is None else len(sealed))


def stack(parts: Sequence[Part], schema: pl.Schema) -> pl.LazyFrame:
    """Rows of parts of one schema below one another, in order; files come before frames."""
    files = [part for part in parts if isinstance(part, Path)]
    frames = [part.lazy() for part in parts if isinstance(part, pl.DataFrame)]
    if files:
        frames.insert(0, scan_frames(files))  # one scan of all files is much faster than one scan per file
    return pl.concat(frames, how="vertical") if frames else pl.LazyFrame(schema=schema)


def merge(parts: Sequence[Part], schema: pl.Schema) -> pl.LazyFrame:
    """One row per id over parts with a column `id` and any others.

    Where parts disagree about an id, the later one holds, unless it has no value there. A single part is
    taken to have no id twice.
    """
    frames = [part.lazy() if isinstance(part, pl.DataFrame) else scan_frames([part]) for part in parts]
    if not frames:
        return pl.LazyFrame(schema=schema)
    if len(frames) == 1:
        return frames[0]
    rows = pl.concat(frames, how="diagonal_relaxed")
    return rows.group_by("id", maintain_order=True).agg(pl.all().drop_nulls().last())


def common_type(one: pl.DataType, other: pl.DataType) -> pl.DataType | None:
    """The type that `merge` gives a column of parts of two types; None if it could not merge them.

    Example:
        >>> common_type(pl.Int64(), pl.Float64()), common_type(pl.List(pl.Int64), pl.String())
        (Float64, None)
    """
    frames = [pl.DataFrame(schema={"x": dtype}) for dtype in (one, other)]
    try:
        common = pl.concat(frames, how="diagonal_relaxed").schema["x"]
    except pl.exceptions.PolarsError:
        return None
    return None if any(_texts_of_nested(dtype, common) for dtype in (one, other)) else common


def _texts_of_nested(dtype: Any, common: Any) -> bool:
    """Whether something nested would become text, which polars announces and then cannot do."""
    lists = (pl.List, pl.Array)
    if isinstance(dtype, lists) and isinstance(common, lists):
        return _texts_of_nested(dtype.inner, common.inner)
    if isinstance(dtype, pl.Struct) and isinstance(common, pl.Struct):
        fields = {field.name: field.dtype for field in common.fields}
        return any(_texts_of_nested(field.dtype, fields[field.name]) for field in dtype.fields)
    return bool(common == pl.String and dtype.is_nested())
