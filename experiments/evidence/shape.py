"""The one shape of the evidence's tables: an estimate with its interval, its seeds, and what it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

from assay.evaluate.intervals import over_seeds
from experiments.tables import Result, table

__all__ = ["cell", "estimate", "section"]


def estimate(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean over seeds, its 95 % interval (Student's t; None for a single seed) and their number."""
    found = over_seeds(list(values))
    ends = (found.low, found.high)
    low, high = (end if isfinite(end) else None for end in ends)
    return {"mean": found.mean, "low": low, "high": high, "n": len(found.per_query)}


def cell(found: dict[str, Any], digits: int = 3, best: bool = False) -> str:
    """Such an estimate as text: `0.712 (0.700 to 0.724)`."""
    mean = f"{found['mean']:.{digits}f}"
    mean = f"**{mean}**" if best else mean
    if found.get("low") is None:
        return mean
    return f"{mean} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def section(
    r: Result,
    title: str,
    what: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    findings: str = "",
    interval: bool = True,
) -> str:
    """A section: what was done, by how many seeds, the table, and what it says in words.

    With `interval=False` the text says itself what the intervals are.

    The command, and how long it took, stand below each section of the page.
    """
    seeds = r["seeds"] if isinstance(r["seeds"], int) else len(r["seeds"])
    known = f"{seeds} seed{'' if seeds == 1 else 's'}"
    if seeds > 1 and interval:
        known += "; in brackets 95 % intervals of the mean over the seeds (Student's t)"
    return f"## {title}\n\n{what} {known}.\n\n{table(head, rows)}" + (f"\n{findings}\n" if findings else "")
