"""What a run says at its end: values of domains and documents, and how far the account closes."""

from __future__ import annotations

from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from assay.cli.progress import percent

if TYPE_CHECKING:
    from assay.store import Ledger
    from assay.train import Result

__all__ = ["print_summary"]

SHOWN = 10
"""Documents listed at each end of a target's ranking."""


def print_summary(console: Console, result: Result) -> None:
    """Print a run: values by group and target, the documents at both ends, the account, the cost.

    Args:
        console: where to.
        result: of the run.
    """
    ledger, by = result.ledger, result.by
    console.print()
    if by is not None:
        console.print(_groups(ledger, by, result.targets))
    for target in result.targets:
        console.print(_documents(ledger, result.documents, target, by))
    console.print(_account(ledger, result.targets))
    lines = (
        "Value: how much the documents lowered the target's loss over the run, in nats per token of the target;",
        "negative ones raised it. Carried: what momentum kept of earlier steps. Explained: values, carried and",
        "weight decay together, as a share of the real drop.",
        "",
        f"{result.steps} steps in {result.seconds:.0f} s. Overhead of assay: {percent(result.overhead)} of a plain step"
        f" (median of {result.comparisons} comparisons).",
    )
    for line in lines:
        console.print(line, highlight=False)


def _groups(ledger: Ledger, by: str, targets: list[str]) -> Table:
    table = _table(f"What each {by} was worth to each target")
    table.add_column(by)
    table.add_column("documents", justify="right")
    frames = {target: ledger.by(by, target) for target in targets}
    cells = {target: {row[by]: row["value"] for row in frame.to_dicts()} for target, frame in frames.items()}
    for target in targets:
        table.add_column(f"→ {target}", justify="right")
    for row in frames[targets[0]].sort(by).to_dicts():
        values = [_signed(cells[target][row[by]], bold=str(row[by]) == target) for target in targets]
        table.add_row(str(row[by]), str(row["samples"]), *values)
    return table


def _documents(ledger: Ledger, documents: pl.DataFrame, target: str, by: str | None) -> Table:
    values = ledger.values(target).join(documents.unique("id", keep="first"), on="id", how="left")
    table = _table(f"Target {target}: most helpful and most harmful documents")
    table.add_column("value", justify="right", no_wrap=True, min_width=7)
    if by is not None:
        table.add_column(by, no_wrap=True, min_width=11)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    shown = min(SHOWN, values.height // 2)
    for part in (values.head(shown), values.tail(shown).reverse()):
        for row in part.to_dicts():
            group = [str(row[by])] if by is not None else []
            table.add_row(_signed(row["value"]), *group, Text(" ".join(row["text"].split())[:200]))
        table.add_section()
    return table


def _account(ledger: Ledger, targets: list[str]) -> Table:
    table = _table("How much of the real loss drop is explained")
    table.add_column("target")
    for column in ("drop", "values", "carried", "decay", "rest", "explained", "negative documents"):
        table.add_column(column, justify="right")
    for target in targets:
        account = ledger.account(target).filter(status="ok")
        columns = ("actual", "predicted", "carried", "decayed", "residual")
        sums = [account[column].drop_nans().sum() for column in columns]
        values = ledger.values(target)["value"]
        negative = float((values < 0).sum() / len(values))
        table.add_row(
            target, *(f"{number:+.3f}" for number in sums), _share(ledger.explained(target)), _share(negative)
        )
    table.caption = _quadrature(ledger)
    return table


def _quadrature(ledger: Ledger) -> str | None:
    """What the points between the ends of the steps cost, where a path took any."""
    if "quadrature" not in ledger.tables:
        return None
    taken = ledger.table("quadrature")
    if not (taken["points"] > 2).any():  # nor has a run any that was taken up at its beginning again
        return None
    points = taken["points"].to_list()
    return (
        f"{fmean(points):.1f} gradients of the targets per step, at most {max(points)}; "
        f"those between the ends took {taken['seconds'].sum():.1f} s"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))


def _share(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if isfinite(share) else "–"


def _signed(value: float, bold: bool = False) -> Text:
    colour = "green" if value > 0 else "red" if value < 0 else "default"
    return Text(f"{value:+.4f}", style=f"bold {colour}" if bold else colour)
