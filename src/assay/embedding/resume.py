"""Going on with gradients that an earlier process of the same run recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from assay.capture.sides import Sides
from assay.embedding.header import Header, read_header
from assay.errors import InputError, StoreError
from assay.methods.base import Context
from assay.rows import Folder, RowReader
from assay.rows.format import NAME as MANIFEST
from assay.rows.sides import load_sides, save_sides

if TYPE_CHECKING:
    from assay.methods.embedding import DataValueEmbedding

__all__ = ["Before", "recorded_before", "recorded_steps", "save_through"]

THROUGH = "through"  # the projections of D g, where they are not those of g


@dataclass(frozen=True)
class Before:
    """What the folder holds.

    Args:
        header: of the recording.
        sides: the projections of g, by name.
        through: those of D g.
        rows: how many count: those of whole steps before the one at which the run goes on.
    """

    header: Header
    sides: dict[str, Sides]
    through: dict[str, Sides]
    rows: int


def recorded_before(folder: Folder, method: DataValueEmbedding, context: Context) -> Before | None:
    """What was recorded before the step at which the run goes on; None where it begins anew.

    Embeddings that were built of the recording are removed, since the rows behind that step may become others.

    Raises:
        InputError: another model, or other settings than it was recorded with.
        StoreError: the folder holds a recording and the run does not go on, or a file is damaged.
    """
    header = read_header(folder)
    if header is None:
        return None
    if context.resumed is None:
        raise StoreError(f"{folder.place} already holds recorded gradients: choose another out=")
    for name in sorted(folder.names(), key=lambda name: not name.endswith("/built.json")):
        if name.startswith("built-"):
            folder.delete(name)
    kept = _steps(folder).filter(pl.col("step") < context.resumed)
    if not len(kept):
        for name in ["header.json", f"rows/{MANIFEST}", *folder.names()]:
            folder.delete(name)
        return None
    _check_same(folder, header, method, context)
    sides = header.sides(folder, context.weights)
    through = sides
    if header.preconditioned and header.projection.kind == "random":
        if not any(name.startswith(f"{THROUGH}/") for name in folder.names()):
            raise StoreError(
                f"{folder.place} was recorded by an older version of assay, which cannot be gone on with: choose "
                "another out= for the rest of the training"
            )
        through = load_sides(folder.below(THROUGH), header.shapes)
    return Before(header, sides, through, int(kept["stop"][-1]))


def save_through(folder: Folder, through: dict[str, Sides]) -> None:
    """Store the projections of D g, which cannot be had from those of g."""
    save_sides(folder.below(THROUGH), through)


def recorded_steps(folder: Folder) -> list[int]:
    """The steps whose gradients are committed, whole; none where none are recorded."""
    return [] if read_header(folder) is None else _steps(folder)["step"].to_list()


def _steps(folder: Folder) -> pl.DataFrame:
    """`step, stop`: the steps that are whole, and one past the last row of each."""
    if folder.read(f"rows/{MANIFEST}") is None:
        return pl.DataFrame(schema={"step": pl.Int64, "stop": pl.Int64})
    table = RowReader(folder.below("rows")).table
    if "step" not in table.columns:
        return pl.DataFrame(schema={"step": pl.Int64, "stop": pl.Int64})
    found = table.with_row_index("row").group_by("step", maintain_order=True)
    whole = found.agg(stop=pl.col("row").max().cast(pl.Int64) + 1, there=pl.len(), of=pl.col("of").first())
    return whole.filter(pl.col("there") == pl.col("of")).select("step", "stop")


def _check_same(folder: Folder, header: Header, method: DataValueEmbedding, context: Context) -> None:
    names = context.weights.names
    shapes = {name: tuple(p.shape) for p, name in names.items()}
    draws = method.draws if method.curvature == "ggn" else 0
    for what, known, now in (
        ("projection", header.projection, method.projection),
        ("parameters", header.shapes, shapes),
        ("dtype", header.dtype, method.dtype),
        ("draws", header.draws, header.draws if draws == "all" and header.draws else draws),
        ("a diagonal of the optimizer", header.preconditioned, context.optimizer.preconditioned),
    ):
        if known != now:
            raise InputError(
                f"Run(resume=...): the gradients in {folder.place} were recorded with {what} {known} and not {now}; go "
                "on with the same, or choose another out=."
            )
