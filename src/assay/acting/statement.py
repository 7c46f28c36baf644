"""How a number was made: what stands beside everything that is decided by values."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay.errors import InputError
from assay.store import Ledger

__all__ = ["BAND", "describe", "summed"]

BAND = (0.8, 1.25)
"""Explained shares outside it mean that the values do not add up to what happened."""


def describe(ledger: Ledger, targets: list[str]) -> dict[str, Any]:
    """Method, targets, explained shares and coverage of a run, as JSON.

    Args:
        ledger: of the run.
        targets: the targets that are used.
    """
    return {
        "run": None if ledger.path is None else str(ledger.path),
        "methods": ledger.info.get("methods", []),
        "targets": targets,
        "sign": "positive: the sample lowered the target's loss",
        "explained": {name: _finite(ledger.explained(name)) for name in targets},
        "coverage": _coverage(ledger),
        "caution": cautions(ledger, targets),
    }


def cautions(ledger: Ledger, targets: list[str]) -> list[str]:
    """What a reader should know before acting on these values, one line each."""
    found = []
    for name in targets:
        share, broken = _finite(ledger.explained(name)), not_finite(ledger, name)
        if broken:
            found.append(f"{name}: {broken}: values and shares are those of the others, not of the whole run")
        if share is None and not broken:
            found.append(
                f"{name}: the real loss drop was not measured, so the values are not held against anything"
            )
        elif share is not None and not BAND[0] <= share <= BAND[1]:
            found.append(
                f"{name}: the account explains {share:.0%} of the real loss drop; see ledger.account()"
            )
    for status, share in (_coverage(ledger) or {}).items():
        if status in ("excluded", "trained later"):
            found.append(f"{share:.1%} of the parameters were {status}: the values are partial")
    return found


def not_finite(ledger: Ledger, target: str) -> str:
    """How many steps of the account have a loss or a value that is no number; empty where none has."""
    account = ledger.account(target)
    count = account.filter(status="nan").height
    return f"{count:,} of {account.height:,} steps are not finite (NaN or infinite)" if count else ""


def summed(ledger: Ledger, targets: list[str]) -> pl.DataFrame:
    """Each sample's value, summed over targets: `id, value, steps`, the largest first.

    Raises:
        InputError: no target, or nothing was recorded.
    """
    if not targets:
        raise InputError("name at least one target")
    frames = [ledger.values(name) for name in targets]
    if not frames[0].height:
        raise InputError(
            "this run recorded no values: there is nothing to go by; train with methods=[assay.InRunShapley(...)]"
        )
    total = frames[0]
    for frame in frames[1:]:
        total = total.join(frame.select("id", other="value"), on="id").select(
            "id", value=pl.col("value") + pl.col("other"), steps="steps"
        )
    return total.sort("value", "id", descending=[True, False])


def targets_of(ledger: Ledger, target: str | list[str] | None) -> list[str]:
    """Names of targets: those given, or the run's only one.

    Raises:
        InputError: an unknown name, or none given for a run that has several.
    """
    names = [target] if isinstance(target, str) else list(target or [])
    if not names:
        ledger.account()  # raises where there are several, with their names
        return ledger.targets
    for name in names:
        ledger.account(name)  # raises, with the names there are
    return list(dict.fromkeys(names))


def _coverage(ledger: Ledger) -> dict[str, float] | None:
    """Share of the parameters' entries by status."""
    if "coverage" not in ledger.tables:
        return None
    table = ledger.table("coverage")
    total = table["entries"].sum() or 1
    sums = table.group_by("status").agg(pl.col("entries").sum()).sort("status")
    return {status: entries / total for status, entries in sums.iter_rows()}


def _finite(number: float) -> float | None:
    return number if abs(number) < float("inf") else None
