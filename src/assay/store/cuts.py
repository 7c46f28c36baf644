"""Rows that a resumed run has overruled: they stay on the disk and count no more.

A run that goes on from a checkpoint of step s takes the steps from s on once more. Its header then says, for every
table, how many parts there were when it went on: rows of those parts count below step s only. This one write of the
header is all that happens, so there is no moment at which rows count twice or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import polars as pl

from assay.store.files import frame_file, frame_schema
from assay.store.header import Cut
from assay.store.parts import Part, stack
from assay.store.schema import STEPWISE

__all__ = ["end_of", "stack_below", "stepwise"]


def stack_below(parts: Sequence[Part], table: str, cuts: Sequence[Cut], schema: pl.Schema) -> pl.LazyFrame:
    """Rows of parts below one another, in order, without those that were overruled.

    Args:
        parts: of a table with a column `step`.
        table: its name.
        cuts: of the run.
        schema: of the parts.
    """
    if not cuts:
        return stack(parts, schema)
    frames = []
    for limit, some in groupby(parts, lambda part: _limit(part, table, cuts)):
        rows = stack(list(some), schema)
        frames.append(rows if limit is None else rows.filter(pl.col("step") < limit))
    return pl.concat(frames, how="vertical") if frames else pl.LazyFrame(schema=schema)


def stepwise(tables: Mapping[str, Sequence[Part]], cuts: Sequence[Cut]) -> dict[str, pl.LazyFrame]:
    """Those of `schema.STEPWISE` that have rows, by name; a column that a part does not have is null there.

    Args:
        tables: Parts by table.
        cuts: of the run.
    """
    found = {}
    for name in STEPWISE:
        alike = groupby(
            tables.get(name, ()), _schema
        )  # one scan of many files is much faster than many scans
        frames = [stack_below(list(some), name, cuts, schema) for schema, some in alike]
        if frames:
            found[name] = pl.concat(frames, how="diagonal_relaxed")
    return found


def _schema(part: Part) -> pl.Schema:
    return frame_schema(part) if isinstance(part, Path) else part.schema


def end_of(parts: Sequence[Part]) -> int:
    """The number that the next part gets: one more than the last, also where parts are missing."""
    numbers = [
        file.number for part in parts if isinstance(part, Path) and (file := frame_file(part)) is not None
    ]
    return max(numbers, default=-1) + 1


def _limit(part: Part, table: str, cuts: Sequence[Cut]) -> int | None:
    """The step below which rows of a part count; None where all do."""
    file = frame_file(part) if isinstance(part, Path) else None
    if file is None:
        return None
    return min((cut.step for cut in cuts if cut.parts.get(table, 0) > file.number), default=None)
