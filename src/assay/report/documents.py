"""The samples that are shown one by one: text, metadata, values for every target, steps that they were in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl

from assay.report.format import Scale, named, plain
from assay.report.tables import Cell, Column, Table, signed_cells

__all__ = ["Document", "describe", "documents", "has_text", "sample_table"]

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
    tokens: Sequence[
        Token
    ] = ()  # the text cut into tokens, each with its value; empty where the run has none


class Token(NamedTuple):
    """A piece of a text, its value, and how far it is coloured: from -1 (harmful) to 1 (helpful)."""

    piece: str
    value: str
    heat: float


class Description(NamedTuple):
    """Metadata of a sample: its text (the part that is embedded), the length of all of it, and the rest."""

    text: str
    characters: int
    facts: dict[str, Any]
    pieces: Sequence[str] = ()  # the text of each token, as far as the run saw it


_NOTHING_KNOWN = Description("", 0, {})


def describe(metadata: pl.DataFrame | None, ids: pl.Series) -> dict[object, Description]:
    """Metadata of a few samples, keyed by id."""
    if metadata is None:
        return {}
    chosen = metadata.join(ids.to_frame("id"), on="id", how="semi")
    text = (
        chosen["text"].fill_null("")
        if has_text(chosen)
        else pl.Series("text", [""] * chosen.height, dtype=pl.String)
    )
    rows = chosen.with_columns(text.str.slice(0, TEXT_LIMIT)).iter_rows(named=True)
    described = {}
    for row, length in zip(rows, text.str.len_chars(), strict=True):
        pieces = row.pop("pieces", None) or ()
        described[row.pop("id")] = Description(row.pop("text"), length, row, pieces)
    return described


def has_text(metadata: pl.DataFrame) -> bool:
    """Whether the metadata holds the samples' texts."""
    return metadata.schema.get("text") == pl.String


def excerpt(text: str) -> str:
    """First words of a text, on one line."""
    words = " ".join(text[: 3 * EXCERPT].split())
    return words if len(words) <= EXCERPT else words[:EXCERPT].rstrip() + " …"


def documents(
    rows: pl.DataFrame,
    described: Mapping[object, Description],
    tag: str | None,
    others: Mapping[str, Mapping[object, float]],
    steps: pl.DataFrame,
    scale: Scale,
    by_token: Mapping[object, Sequence[float]] | None = None,
) -> list[Document]:
    """Describe samples for a list.

    Args:
        rows: Columns id, value, steps, in the order of the list.
        described: Metadata by id.
        tag: Metadata column that is shown beside the value.
        others: Value of each sample for every target, by target and id.
        steps: Columns step, id, value of these samples (others are ignored).
        scale: Scale of the values of this list.
        by_token: Value of each position of a sample, by id, where the run has them.
    """
    visits: dict[object, list[tuple[int, float]]] = {}
    of_rows = steps.join(rows.select("id"), on="id", how="semi").filter(pl.col("value").is_finite())
    for step, identity, value in of_rows.select("step", "id", "value").sort("step").iter_rows():
        visits.setdefault(identity, []).append((step, value))
    shown = []
    for identity, value in rows.select("id", "value").iter_rows():
        known = described.get(identity, _NOTHING_KNOWN)
        seen = visits.get(identity, [])
        shown.append(
            Document(
                id=str(identity),
                value=scale.signed(value),
                helpful=value > 0,
                tag=named(known.facts[tag]) if tag in known.facts else "",
                excerpt=excerpt(known.text) or str(identity),
                text=known.text,
                cut=f"first {TEXT_LIMIT:,} of {known.characters:,} characters"
                if known.characters > TEXT_LIMIT
                else "",
                facts=[
                    (name, excerpt(named(fact))) for name, fact in known.facts.items() if fact is not None
                ],
                values=[(t, scale.signed(of_target.get(identity))) for t, of_target in others.items()],
                visits=[(plain(step), scale.signed(v)) for step, v in seen[:VISITS]],
                more_visits=max(0, len(seen) - VISITS),
                tokens=_tokens(known.pieces, (by_token or {}).get(identity, ())),
            )
        )
    return shown


def _tokens(pieces: Sequence[str], values: Sequence[float]) -> list[Token]:
    """Pieces with their values, coloured relative to the largest magnitude among them."""
    if not pieces or not values:
        return []
    scale, largest = Scale.of(values), max(map(abs, values)) or 1.0
    return [
        Token(
            piece or "▸", scale.signed(value), value / largest
        )  # the mark of the start has no text of its own
        for piece, value in zip(pieces, values, strict=False)
    ]


def sample_table(
    ids: pl.Series,
    seen: Mapping[object, int],
    described: Mapping[object, Description],
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
    texts = any(description.text for description in described.values())
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
        known = described.get(key, _NOTHING_KNOWN)
        head = [Cell(str(key))]
        if tag:
            head.append(Cell(named(known.facts.get(tag))))
        count = seen.get(key)
        tail = [Cell(plain(count), count)]
        if texts:
            tail.append(Cell(excerpt(known.text), clipped=True))
        rows.append([*head, *of_targets, *tail])
    return Table(caption, columns, rows, page=15, classes="samples")
