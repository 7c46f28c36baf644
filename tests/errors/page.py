"""docs/bad-input.md from the messages that the tests drew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from errors.sites import Site, sites

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "bad_input.jsonl"
PAGE = ROOT / "docs" / "bad-input.md"
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(rows: Sequence[Row]) -> str:
    """The page: part by part of the library, what was tried and what it says."""
    known = {(row["where"], row["form"]): row for row in rows}
    places = sites()
    silent = sum(not row["message"] for row in rows)
    lines = [
        "# Bad input, and what assay says to it",
        "",
        "Written by `python scripts/bad_input.py` from the tests: every place in the source that raises an error of "
        "assay's own, with one message that a test drew from it. Each is one line that says what is wrong, where, and "
        "what to do. All are kinds of `assay.AssayError`; `InputError` is a `ValueError` and `StoreError` an `OSError` "
        "too.",
        "",
        f"{len(rows)} places; {silent} of them have only the form of the message (`…` for what differs), because none "
        "of the tests that this page was made from draws it.",
        "",
    ]
    for part, group in groupby(places, key=lambda site: _part(site.where)):
        lines += [f"## {part}", "", "| tried | error | message |", "|---|---|---|"]
        lines += [*_rows(group, known), ""]
    return "\n".join(lines)


def _part(where: str) -> str:
    file = where.partition(" ")[0]
    return f"assay.{file.partition('/')[0].removesuffix('.py')}"


def _rows(group: Iterable[Site], known: dict[tuple[str, str], Row]) -> Iterator[str]:
    for site in group:
        row = known.get((site.where, site.form))
        if row is None or not row["message"]:
            yield f"| *no test draws it* | | {_cell(site.form)} |"
        else:
            yield f"| {_cell(tried(row['test']))} | {row['error']} | {_cell(row['message'])} |"


def tried(test: str) -> str:
    """The name of a test, and of its case, in words."""
    name, _, case = test.partition("::")[2].partition("[")
    words = name.removeprefix("test_").replace("_", " ")
    case = case.removesuffix("]")
    return f"{words}: {case}" if case else words


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", " ".join(text.split()))
