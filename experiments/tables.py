"""What the pages of all topics are made of: tables, and rows found by their columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Result = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def by(rows: Sequence[Result], *names: str) -> dict[tuple[Any, ...], Result]:
    """Rows by the values of some columns."""
    return {tuple(row[name] for name in names): row for row in rows}


def order(rows: Sequence[Result], name: str) -> list[Any]:
    """The values of a column as they first appear."""
    return list(dict.fromkeys(row[name] for row in rows))
