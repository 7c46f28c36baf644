"""The samples that are shown one by one: text, metadata, values for every target, steps that they were in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from assay.report.format import Scale, plain
from assay.report.tables import Cell, Column, Table, signed_cells

__all__ = ["Document", "describe", "documents", "sample_table"]

TEXT_LIMIT = 4000  # characters of a text that are embedded
EXCERPT = 160
VISITS = 8


@dataclass(frozen=True)
class Document:
    """One sample in a list of the most helpful or harmful."""

    id: str
    value: str
    helpful: bool
    tag: str
    excerpt: str
    text: str
    cut: str  # what is said when the text goes on
    facts: Sequence[tuple[str, str]]
    values: Sequence[tuple[str, str]]
    visits: Sequence[tuple[str, str]]
    more_visits: int


def describe(metadata: pl.DataFrame | None, ids: pl.Series) -> dict[object, dict[str, Any]]:
    """Metadata of a few samples, keyed by id."""
    if metadata is None:
        return {}
    return {
        row["id"]: row for row in metadata.filter(pl.col("id").is_in(ids.implode())).iter_rows(named=True)
    }


def excerpt(text: object) -> str:
    """First words of a text, on one line."""
    words = " ".join(str(text)[: 3 * EXCERPT].split()) if text is not None else ""
    return words if len(words) <= EXCERPT else words[:EXCERPT].rstrip() + " …"


def documents(
    rows: pl.DataFrame,
    described: Mapping[object, Mapping[str, Any]],
    tag: str | None,
    others: Mapping[str, Mapping[object, float]],
    steps: pl.DataFrame,
    scale: Scale,
) -> list[Document]:
    """Describe samples for a list.

    Args:
        rows: Columns id, value, steps, in the order of the list.
        described: Metadata by id.
        tag: Metadata column that is shown beside the value.
        others: Value of each sample for every target, by target and id.
        steps: Columns step, id, value of these samples (others are ignored).
        scale: Scale of the values of this list.
    """
    visits: dict[object, list[tuple[int, float]]] = {}
    of_rows = steps.filter(pl.col("id").is_in(rows["id"].implode()) & pl.col("value").is_finite())
    for step, identity, value in of_rows.select("step", "id", "value").sort("step").iter_rows():
        visits.setdefault(identity, []).append((step, value))
    shown = []
    for identity, value in rows.select("id", "value").iter_rows():
        facts = dict(described.get(identity, {}))
        text = facts.pop("text", None)
        body = "" if text is None else str(text)
        seen = visits.get(identity, [])
        shown.append(
            Document(
                id=str(identity),
                value=scale.signed(value),
                helpful=value > 0,
                tag=plain(facts.get(tag)) if tag in facts else "",
                excerpt=excerpt(text) or str(identity),
                text=body[:TEXT_LIMIT],
                cut=f"first {TEXT_LIMIT:,} of {len(body):,} characters" if len(body) > TEXT_LIMIT else "",
                facts=[(k, plain(v)) for k, v in facts.items() if k != "id" and v is not None],
                values=[(t, scale.signed(of_target.get(identity))) for t, of_target in others.items()],
                visits=[(plain(step), scale.signed(v)) for step, v in seen[:VISITS]],
                more_visits=max(0, len(seen) - VISITS),
            )
        )
    return shown


def sample_table(
    ids: pl.Series,
    seen: Mapping[object, int],
    described: Mapping[object, Mapping[str, Any]],
    tag: str | None,
    values: Mapping[str, Mapping[object, float]],
    caption: str,
) -> Table:
    """Table of many samples, one row each, with the value for every target.

    Args:
        ids: The samples, in the order of the table.
        seen: Number of steps in which each sample took part, by id.
        described: Metadata by id.
        tag: Metadata column that is shown, if any.
        values: Value of each sample, by target and id.
        caption: What the table holds.
    """
    texts = any(row.get("text") is not None for row in described.values())
    columns = [Column("id"), *([Column(tag)] if tag else [])]
    keys = ids.to_list()
    cells = []
    for target, of_target in values.items():
        column = [of_target.get(key) for key in keys]
        scale = Scale.of(column)
        columns.append(Column(target, True, note=scale.unit))
        cells.append(signed_cells(column, scale))
    columns += [Column("steps", True), *([Column("text")] if texts else [])]
    rows = []
    for key, *of_targets in zip(keys, *cells, strict=True):
        row = described.get(key, {})
        head = [Cell(str(key))]
        if tag:
            head.append(Cell(plain(row.get(tag))))
        count = seen.get(key)
        tail = [Cell(plain(count), count)]
        if texts:
            tail.append(Cell(excerpt(row.get("text")), clipped=True))
        rows.append([*head, *of_targets, *tail])
    return Table(caption, columns, rows, page=15, classes="samples")
