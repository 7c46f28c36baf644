"""Tables of the page: rows of cells that carry a text, what they sort by, and how far they are coloured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from assay.report.aggregate import UNNAMED
from assay.report.format import Scale, is_number, named, percent, plain

__all__ = [
    "Cell",
    "Column",
    "Table",
    "account_totals",
    "agreement",
    "group_table",
    "matrix",
    "quantities",
    "settings",
    "side_table",
    "trusted",
]


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


def _name(value: object) -> str:
    return UNNAMED if value is None else named(value)


def _largest(frames: dict[str, pl.DataFrame], column: str, limit: int) -> dict[str, pl.DataFrame]:
    """Rows of the groups with the most samples. Every target has the same samples, so the rows correspond."""
    order = [pl.col("samples"), pl.col(column).cast(pl.String)]
    return {t: f.sort(order, descending=[True, False]).head(limit) for t, f in frames.items()}


def _heads(frames: dict[str, pl.DataFrame], column: str) -> list[tuple[Cell, Cell]]:
    """Name and number of samples of each group."""
    rows = next(iter(frames.values())).select(column, "samples").iter_rows()
    return [(Cell(_name(group)), Cell(plain(samples), samples)) for group, samples in rows]


def matrix(frames: dict[str, pl.DataFrame], column: str, noun: str, limit: int = 500) -> dict[str, Table]:
    """Group × target tables of the total value, the value per sample and the share of negative samples.

    Args:
        frames: Of every target, what `ledger.by(column, target)` answers.
        column: The metadata column.
        noun: What a sample is called.
        limit: Largest number of groups; the groups with the most samples are kept.

    Returns:
        Tables by the name of their measure.
    """
    kept = _largest(frames, column, limit)
    heads = _heads(kept, column)
    cut = _cut(frames, limit)
    tables = {}
    for title, key in (
        ("total value", "value"),
        (f"value per {noun}", "mean"),
        ("share negative", "negative"),
    ):
        values = [frame[key].to_list() for frame in kept.values()]
        scale = Scale.of(v for of_target in values for v in of_target)
        cells = [_share_cells(v) if key == "negative" else signed_cells(v, scale) for v in values]
        unit = "" if key == "negative" else f", in {scale.unit}"
        tables[title] = Table(
            f"{title.capitalize()} by {column} (rows) and target (columns){unit}{cut}",
            [Column(column), Column(f"{noun}s", True), *(Column(t, True) for t in frames)],
            [[*head, *row] for head, *row in zip(heads, *cells, strict=True)],
            page=30,
            classes="matrix",
        )
    return tables


def group_table(frames: dict[str, pl.DataFrame], column: str, noun: str, limit: int = 500) -> Table:
    """One metadata column: samples of each group, and for each target its value and share of negatives.

    Args:
        frames: Of every target, what `ledger.by(column, target)` answers.
        column: The metadata column.
        noun: What a sample is called.
        limit: Largest number of groups; the groups with the most samples are kept.
    """
    kept = _largest(frames, column, limit)
    columns = [Column(column), Column(f"{noun}s", True)]
    cells = []
    for target, frame in kept.items():
        scale = Scale.of(frame["value"])
        columns += [Column(target, True, note=scale.unit), Column("negative", True, note=target)]
        cells += [signed_cells(frame["value"].to_list(), scale), _share_cells(frame["negative"].to_list())]
    rows = [[*head, *row] for head, *row in zip(_heads(kept, column), *cells, strict=True)]
    return Table(f"Value by {column}{_cut(frames, limit)}", columns, rows, page=15)


def _cut(frames: dict[str, pl.DataFrame], limit: int) -> str:
    groups = next(iter(frames.values())).height
    return f" (the {limit:,} largest of {groups:,} groups)" if groups > limit else ""


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
    labels = ("values", "carried", "weight decay", "actual drop", "residual")
    return Table(
        f"The account of each target over the whole run, in {scale.unit}",
        [Column("target"), *(Column(label, True) for label in labels), Column("explained", True)],
        rows,
    )


def agreement(frame: pl.DataFrame, noun: str) -> Table:
    """How each cheaper method ranks the samples beside the exact answer, the best first.

    Args:
        frame: `method`, `query`, `by_step`, `by_id`, of `Ledger.agreement`.
        noun: What a sample is called.
    """
    rows = [
        [Cell(method), Cell(query), _correlation(by_id), _correlation(by_step)]
        for method, query, by_step, by_id in frame.select("method", "query", "by_step", "by_id").iter_rows()
    ]
    columns = [Column("method"), Column("target"), Column(f"by {noun}", True), Column("by step", True)]
    return Table("Rank correlation with the exact values", columns, rows)


def trusted(frame: pl.DataFrame | None, noun: str) -> str:
    """Which method to trust on this run: by its worst target, since one that fails one target is no guide."""
    if frame is None:
        return ""
    worst = frame.group_by("method").agg(pl.col("by_id").min()).drop_nulls()
    worst = worst.filter(pl.col("by_id").is_not_nan()).sort("by_id", "method", descending=[True, False])
    if not worst.height:
        return ""
    method, found = worst.row(0)
    if found >= 0.9:
        advice = (
            f"“{method}” rank the {noun}s almost as the exact values do: on this run they can stand for them"
        )
    elif found >= 0.5:
        advice = (
            f"“{method}” come nearest: good for which {noun}s stand at the ends, not for their exact order"
        )
    else:
        advice = f"no cheaper method is near (the best are “{method}”): on this run use the exact values themselves"
    return f"By its worst target (correlation {found:.2f}): {advice}."


def _correlation(value: float | None) -> Cell:
    text = f"{value:.2f}".replace("-", "−") if value is not None and is_number(value) else "–"
    return _number(value, text, value if is_number(value) else None)


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


def quantities(rows: Sequence[tuple[str, object]], caption: str) -> Table:
    """Names and measured values."""
    cells = [[Cell(name.replace("_", " ")), Cell(plain(value))] for name, value in rows]
    return Table(caption, [Column("quantity"), Column("value")], cells, page=50)


def settings(rows: Sequence[tuple[str, object]], caption: str) -> Table:
    """Names and values, such as a configuration; a seed is a name too, so whole numbers stay as they are."""
    return Table(
        caption,
        [Column("name"), Column("value")],
        [[Cell(name), Cell(named(value))] for name, value in rows],
        page=50,
    )
