"""What a run says at its end: values of domains and documents, and how far the account closes."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import polars as pl
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
    console.print(
        "Positive: lowered the target's loss. Unit: nats per token of the target, summed over the run.",
        highlight=False,
    )
    overhead = percent(result.overhead)
    console.print(
        f"{result.steps} steps in {result.seconds:.0f} s; assay's overhead {overhead}, "
        f"the median of {result.comparisons} comparisons with a plain step",
        highlight=False,
    )


def _groups(ledger: Ledger, by: str, targets: list[str]) -> Table:
    table = Table(title=f"what each {by} was worth to each target", title_justify="left")
    table.add_column(by)
    table.add_column("documents", justify="right")
    frames = {target: ledger.by(by, target) for target in targets}
    cells = {target: {row[by]: row["value"] for row in frame.to_dicts()} for target, frame in frames.items()}
    for target in targets:
        table.add_column(target, justify="right")
    for row in frames[targets[0]].sort(by).to_dicts():
        values = [_signed(cells[target][row[by]], f"{row[by]}" == target) for target in targets]
        table.add_row(str(row[by]), str(row["samples"]), *values)
    return table


def _documents(ledger: Ledger, documents: pl.DataFrame, target: str, by: str | None) -> Table:
    values = ledger.values(target).join(documents.unique("id", keep="first"), on="id", how="left")
    table = Table(title=f"target {target}: most helpful and most harmful documents", title_justify="left")
    table.add_column("value", justify="right", no_wrap=True)
    if by is not None:
        table.add_column(by, no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    ends = min(SHOWN, values.height // 2)
    for part in (values.head(ends), values.tail(ends).reverse()):
        for row in part.to_dicts():
            group = [str(row[by])] if by is not None else []
            table.add_row(_signed(row["value"]), *group, Text(" ".join((row["text"] or "").split())[:200]))
        table.add_section()
    return table


def _account(ledger: Ledger, targets: list[str]) -> Table:
    table = Table(title="how much of the real loss drop is explained", title_justify="left")
    for column in (
        "target",
        "real drop",
        "by values",
        "carried",
        "decay",
        "unexplained",
        "explained",
        "negative",
    ):
        table.add_column(column, justify="left" if column == "target" else "right")
    for target in targets:
        account = ledger.account(target).filter(status="ok")
        sums = [
            account[column].drop_nans().sum()
            for column in ("actual", "predicted", "carried", "decayed", "residual")
        ]
        values = ledger.values(target)["value"]
        share, negative = ledger.explained(target), float((values < 0).sum() / len(values))
        table.add_row(
            target,
            *(f"{number:+.3f}" for number in sums),
            f"{share:.0%}" if isfinite(share) else "–",
            f"{negative:.0%}",
        )
    return table


def _signed(value: float, bold: bool = False) -> Text:
    colour = "green" if value > 0 else "red" if value < 0 else "default"
    return Text(f"{value:+.4f}", style=f"bold {colour}" if bold else colour)
