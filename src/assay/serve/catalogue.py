"""What the explorer shows of a ledger: pages of documents, one document, a selection to take away."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from assay.errors import InputError
from assay.report.aggregate import group_columns
from assay.store import Ledger

__all__ = ["Catalogue"]

PAGE = 25
EXCERPT = 200
CURVE = 400


class Catalogue:
    """Documents of a run with their values, read once.

    Args:
        ledger: of a run, finished or not.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.targets = list(ledger.targets)
        self.explained = {name: _known(ledger.explained(name)) for name in self.targets}
        self.metadata = ledger.metadata().drop("pieces", strict=False)
        self.columns = group_columns(self.metadata) if self.metadata.height else []
        self.values = {name: ledger.values(name) for name in self.targets}
        ids = next(iter(self.values.values()))["id"] if self.values else pl.Series([], dtype=pl.String)
        self._names = {str(id_): id_ for id_ in ids}
        if "text" not in self.metadata.columns:
            self.metadata = self.metadata.with_columns(text=pl.lit(""))

    def groups(self, column: str) -> list[str]:
        """The different values of a metadata column."""
        if column not in self.columns:
            raise InputError(f"there is no column {column!r} to filter by: choose one of the run's metadata")
        return sorted(self.metadata[column].cast(pl.String).drop_nulls().unique())

    def page(
        self,
        target: str,
        words: str = "",
        column: str = "",
        group: str = "",
        worst: bool = False,
        page: int = 0,
    ) -> dict[str, Any]:
        """One page of documents in the order of their values.

        Args:
            target: that they are valued for.
            words: only documents whose text or id contains this.
            column: metadata column to filter by, with `group`.
            group: only documents of this group.
            worst: the smallest value first.
            page: from 0.
        """
        frame = self.filtered(target, words, column, group)
        frame = frame.reverse() if worst else frame
        shown = frame.slice(page * PAGE, PAGE)
        return {"total": frame.height, "page": page, "size": PAGE, "rows": self.rows(shown)}

    def rows(self, frame: pl.DataFrame) -> list[dict[str, Any]]:
        """Documents for a list: id, value, steps, whatever else the frame has, excerpt; `tags` holds the groups."""
        text = pl.col("text").fill_null("").str.slice(0, EXCERPT).str.replace_all(r"\s+", " ")
        known = self.metadata.select("id", text, *(pl.col(c).alias(f"tag {c}") for c in self.columns))
        joined = frame.join(known, on="id", how="left", maintain_order="left")
        rows = [
            {key: _plain(value) for key, value in row.items()}
            for row in joined.with_columns(pl.col("id").cast(pl.String)).to_dicts()
        ]
        return [{"tags": {c: row.pop(f"tag {c}") for c in self.columns}, **row} for row in rows]

    def document(self, name: str) -> dict[str, Any]:
        """One document: text, metadata, values, and its value added up over the steps.

        Raises:
            InputError: the run has no such document.
        """
        id_ = self._names.get(name)
        if id_ is None:
            raise InputError(f"the run has no document {name!r}: choose one of its ids")
        row = self.metadata.filter(pl.col("id") == id_).to_dicts()
        facts = {key: _plain(value) for key, value in (row[0] if row else {}).items() if key != "id"}
        values, curves = {}, {}
        for target in self.targets:
            of_target = self.values[target].filter(pl.col("id") == id_)
            values[target] = _known(of_target["value"].item()) if of_target.height else None
            curves[target] = self._curve(target, id_)
        return {"id": name, "text": facts.pop("text", ""), "facts": facts, "values": values, "curves": curves}

    def selection(
        self, target: str, words: str = "", column: str = "", group: str = "", drop: str = ""
    ) -> pl.DataFrame:
        """The documents that a filter leaves: id, value, steps and all metadata.

        Metadata keep their names: beside a `value` or `steps` of theirs the run's is `run_value` or `run_steps`.
        """
        frame = self.filtered(target, words, column, group)
        if drop == "negative":
            frame = frame.filter(pl.col("value") >= 0)
        taken: dict[str, str] = {
            name: f"run_{name}" for name in ("value", "steps") if name in self.metadata.columns
        }
        return frame.rename(taken).join(self.metadata, on="id", how="left", maintain_order="left")

    def filtered(self, target: str, words: str, column: str, group: str) -> pl.DataFrame:
        """The values that a filter leaves: id, value, steps, the largest value first."""
        if target not in self.values:
            raise InputError(f"there is no target {target!r}: choose one of the run's")
        frame = self.values[target]
        kept = self.metadata
        if group:
            self.groups(column)  # raises
            kept = kept.filter(pl.col(column).cast(pl.String) == group)
        if words:
            inside = pl.col("text").fill_null("").str.to_lowercase().str.contains(words.lower(), literal=True)
            kept = kept.filter(inside | pl.col("id").cast(pl.String).str.contains(words, literal=True))
        return frame.join(kept.select("id"), on="id", how="semi") if words or group else frame

    def _curve(self, target: str, id_: Any) -> list[list[float]]:
        """`[[step, value so far], …]`."""
        steps = self.ledger.steps(target).filter((pl.col("id") == id_) & pl.col("value").is_finite())
        sums = steps.group_by("step").agg(pl.col("value").sum()).sort("step")
        sums = sums.with_columns(pl.col("value").cum_sum())
        return [list(row) for row in sums.tail(CURVE).iter_rows()]


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, float):
        return _known(value)
    return value if isinstance(value, str | int | bool | None) else str(value)
