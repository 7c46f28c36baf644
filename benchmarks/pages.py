"""Results of a benchmark as JSON, and its figures in a page of the documentation, between marks that name it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["keep", "page_of", "spread", "table", "with_figures"]

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results"
END = "<!-- end of the figures -->\n"


def page_of(name: str) -> Path:
    """A page of the documentation."""
    return DOCS / f"{name}.md"


def keep(
    document: dict[str, Any],
    out: Path | None,
    script: str,
    page: str,
    figures: Callable[[dict[str, Any]], str],
) -> None:
    """Write results to their file, and their figures into the page if that is the one which the page is made from.

    Args:
        document: the results.
        out: the file; None keeps nothing.
        script: the benchmark, `benchmarks/SCRIPT.py`, whose page is made from `results/SCRIPT-cpu.json`.
        page: of the documentation.
        figures: turns the results into Markdown.
    """
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    if out == RESULTS / f"{script}-cpu.json":
        file = page_of(page)
        shown = with_figures(file.read_text(encoding="utf-8"), script, figures(document))
        file.write_text(shown, encoding="utf-8")


def with_figures(page: str, script: str, figures: str) -> str:
    """The page with these figures where it has those of `benchmarks/SCRIPT.py`.

    Raises:
        ValueError: the page has no such place.
    """
    begin = f"<!-- figures of benchmarks/{script}.py -->\n"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the page lacks the marks {begin.strip()!r} and {END.strip()!r}")
    return f"{before}{begin}\n{figures}\n{END}{after}"


def spread(found: Mapping[str, float], sign: str = "", digits: int = 2, to: str = "-") -> str:
    """A median with its quartiles."""
    middle, low, high = (
        format(found[key], f"{sign}.{digits}f") for key in ("median", "lower_quartile", "upper_quartile")
    )
    return f"{middle} ({low}{to}{high})"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
