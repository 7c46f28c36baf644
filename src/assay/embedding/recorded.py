"""The gradients that a run recorded, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from assay.embedding.header import SCALARS, read_header
from assay.errors import InputError
from assay.rows import Folder, RowReader

__all__ = ["Recorded", "RecordedStep"]


@dataclass(frozen=True)
class RecordedStep:
    """One optimizer step.

    Args:
        number: of the step in the run.
        start: its first row.
        stop: one past its last row.
        scalars: `[parameters, 7]` float64, in the order of `header.SCALARS`.
    """

    number: int
    start: int
    stop: int
    scalars: Tensor


class Recorded:
    """What is committed of a recording; a step that is there only in part is left out.

    Args:
        folder: of the recorded gradients.

    Raises:
        InputError: the run recorded none.
        StoreError: a file is damaged; it is named.
    """

    def __init__(self, folder: Folder) -> None:
        header = read_header(folder)
        if header is None:
            raise InputError(
                "this run recorded no gradients: train with methods=[assay.DataValueEmbedding(...)]."
            )
        self.folder, self.header = folder, header
        self.reader = RowReader(folder.below("rows"))
        table = self.reader.table
        self.steps: list[RecordedStep] = []
        if len(table):
            self.steps = _steps(table, len(header.shapes))
        self.length = self.steps[-1].stop if self.steps else 0
        if not self.length:
            raise InputError(
                "this run recorded no gradients yet: not one step is committed; train on, or close the run."
            )
        self.table = table.select("step", "id")[: self.length]
        self.weights = torch.from_numpy(table["weight"].to_numpy().copy())[: self.length]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 if stored so, else float32."""
        return torch.float64 if self.header.dtype == "fp64" else torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        """`[rows, parts, width]`."""
        rows = self.reader.read(start, stop)
        return rows.view(len(rows), self.header.parts, self.header.width)

    def windows(self, first: int, last: int) -> list[tuple[int, int]]:
        """Steps `first` to `last − 1` in pieces of about 32 MiB, `(first, last)` each."""
        most, found, begin = self.reader.piece_rows(), [], first
        for n in range(first, last):
            if n > begin and self.steps[n].stop - self.steps[begin].start > most:
                found.append((begin, n))
                begin = n
        return [*found, (begin, last)] if last > first else []

    def rates(self) -> pl.DataFrame:
        """`step, lr`: the largest learning rate of the step's parameter groups."""
        place = SCALARS.index("rate")
        rows = [(s.number, float(s.scalars[:, place].max())) for s in self.steps]
        return pl.DataFrame(rows, schema={"step": pl.Int64, "lr": pl.Float64}, orient="row")


def _steps(table: pl.DataFrame, params: int) -> list[RecordedStep]:
    lines = table.with_row_index("row").filter(pl.col("scalars").is_not_null())
    found = []
    for row, step, of, scalars in lines.select("row", "step", "of", "scalars").iter_rows():
        if row + of <= len(table):
            numbers = torch.tensor(scalars, dtype=torch.float64).view(params, len(SCALARS))
            found.append(RecordedStep(step, row, row + of, numbers))
    return found
