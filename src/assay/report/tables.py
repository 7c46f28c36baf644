"""Tables of the page: rows of cells that carry a text, what they sort by, and how far they are coloured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from assay.report.aggregate import UNNAMED
from assay.report.format import MISSING, Scale, is_number, percent, plain

__all__ = ["Cell", "Column", "Table", "account_totals", "group_table", "matrix", "settings", "side_table"]


@dataclass(frozen=True)
class Column:
    """Header of a column; `numeric` columns are right-aligned and sort as numbers, largest first."""

    label: str
    numeric: bool = False
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What it says.
        order: What it sorts by in a numeric column; None for a number that is missing.
        heat: How far it is coloured, from -1 (harmful) to 1 (helpful).
        href: Anchor that the text leads to.
        clipped: Whether a long text is cut to two lines.
    """

    text: str
    order: float | None = None
    heat: float | None = None
    href: str | None = None
    clipped: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption; more than `page` rows are shown in pages."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    page: int = 25
    classes: str = ""


def _number(value: float | None, text: str, heat: float | None = None) -> Cell:
    return Cell(text, value if is_number(value) else None, heat)


def signed_cells(values: Sequence[float | None], scale: Scale) -> list[Cell]:
    """Cells of one column of values, coloured relative to the largest magnitude in it."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return [
        _number(v, scale.signed(v), v / largest if largest and v is not None and is_number(v) else None)
        for v in values
    ]


def _share_cells(shares: Sequence[float | None]) -> list[Cell]:
    # Coloured as harm: all negative is the full colour.
    return [
        _number(share, percent(share), -share if is_number(share) and share else None) for share in shares
    ]


def _counts(values: Iterable[int | None]) -> list[Cell]:
    return [_number(value, plain(value)) for value in values]


def _name(value: object) -> str:
    return UNNAMED if value is None else str(value)


def _grouped(
    frames: dict[str, pl.DataFrame], column: str
) -> tuple[list[object], dict[str, dict[object, dict[str, float]]]]:
    """Groups in the order of their number of samples, and each target's rows keyed by group."""
    rows = {
        target: {row[column]: row for row in frame.iter_rows(named=True)} for target, frame in frames.items()
    }
    samples: dict[object, float] = {}
    for by_group in rows.values():
        for group, row in by_group.items():
            samples[group] = max(samples.get(group, 0), row["samples"])
    return sorted(samples, key=lambda group: (-samples[group], _name(group))), rows


def matrix(frames: dict[str, pl.DataFrame], column: str, noun: str) -> dict[str, Table]:
    """Group × target tables of the total value, the value per sample and the share of negative samples.

    Args:
        frames: `ledger.by(column, target)` of every target.
        column: The metadata column.
        noun: What a sample is called.

    Returns:
        Tables by the name of their measure.
    """
    groups, rows = _grouped(frames, column)
    samples = [max((int(r[g]["samples"]) for r in rows.values() if g in r), default=0) for g in groups]
    measures = {"total value": "value", f"value per {noun}": "mean", "share negative": "negative"}
    tables = {}
    for title, key in measures.items():
        values = {t: [_measure(r.get(group), key) for group in groups] for t, r in rows.items()}
        scale = Scale.of(v for column_values in values.values() for v in column_values)
        cells = [_share_cells(v) if key == "negative" else signed_cells(v, scale) for v in values.values()]
        unit = "" if key == "negative" else f", in {scale.unit}"
        tables[title] = Table(
            f"{title.capitalize()} by {column} (rows) and target (columns){unit}",
            [Column(column), Column(f"{noun}s", True), *(Column(t, True) for t in frames)],
            [[Cell(_name(g)), *row] for g, *row in zip(groups, _counts(samples), *cells, strict=True)],
            page=30,
            classes="matrix",
        )
    return tables


def _measure(row: dict[str, float] | None, key: str) -> float | None:
    return None if row is None else row[key]


def group_table(frames: dict[str, pl.DataFrame], column: str, noun: str, limit: int = 500) -> Table:
    """One metadata column: samples of each group, and for each target its value and share of negatives.

    Args:
        frames: `ledger.by(column, target)` of every target.
        column: The metadata column.
        noun: What a sample is called.
        limit: Largest number of groups; the groups with the most samples are kept.
    """
    groups, rows = _grouped(frames, column)
    kept = groups[:limit]
    samples = [max((int(r[g]["samples"]) for r in rows.values() if g in r), default=0) for g in kept]
    columns = [Column(column), Column(f"{noun}s", True)]
    cells = [_counts(samples)]
    for target, by_group in rows.items():
        values = [_measure(by_group.get(group), "value") for group in kept]
        scale = Scale.of(values)
        columns += [Column(target, True, note=scale.unit), Column("negative", True, note=target)]
        cells += [
            signed_cells(values, scale),
            _share_cells([_measure(by_group.get(g), "negative") for g in kept]),
        ]
    cut = f" (the {limit:,} largest of {len(groups):,} groups)" if len(groups) > limit else ""
    return Table(
        f"Value by {column}{cut}",
        columns,
        [[Cell(_name(g)), *row] for g, *row in zip(kept, *cells, strict=True)],
        page=15,
    )


def account_totals(
    totals: dict[str, dict[str, float]], explained: dict[str, float | None], links: dict[str, str]
) -> Table:
    """Each target's account summed over the run.

    Args:
        totals: Per target, the sums of predicted, carried, decayed, actual and residual.
        explained: Per target, the share of the actual drop that the values explain.
        links: Anchor of every target's section.
    """
    names = ("predicted", "carried", "decayed", "actual", "residual")
    scale = Scale.of(row.get(name) for row in totals.values() for name in names)
    rows = [
        [
            Cell(target, href=links[target]),
            *(_number(row.get(name), scale.signed(row.get(name))) for name in names),
            _number(explained[target], percent(explained[target])),
        ]
        for target, row in totals.items()
    ]
    labels = ("values of samples", "carried", "weight decay", "actual drop", "residual")
    return Table(
        f"The account of each target over the whole run, in {scale.unit}",
        [Column("target"), *(Column(label, True) for label in labels), Column("explained", True)],
        rows,
    )


def side_table(frame: pl.DataFrame, caption: str, limit: int = 2000) -> Table:
    """A side table of the run as it is, its first `limit` rows."""
    numeric = [dtype.is_numeric() for dtype in frame.dtypes]
    rows = [
        [Cell(plain(v), float(v) if is_number(v) else None) for v in row]
        for row in frame.head(limit).iter_rows()
    ]
    cut = f" (first {limit:,} of {frame.height:,} rows)" if frame.height > limit else ""
    columns = [Column(n.replace("_", " "), is_num) for n, is_num in zip(frame.columns, numeric, strict=True)]
    return Table(caption + cut, columns, rows)


def settings(rows: Sequence[tuple[str, str]], caption: str) -> Table:
    """Names and values, such as a configuration."""
    return Table(
        caption, [Column("name"), Column("value")], [[Cell(k), Cell(v or MISSING)] for k, v in rows], page=50
    )
