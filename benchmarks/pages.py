"""Figures of a benchmark in a page of the documentation, between two marks that name the script which writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["page_of", "spread", "with_figures"]

DOCS = Path(__file__).parents[1] / "docs"
END = "<!-- end of the figures -->\n"


def page_of(name: str) -> Path:
    """A page of the documentation."""
    return DOCS / f"{name}.md"


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


def spread(found: Mapping[str, float]) -> str:
    """A median with its quartiles."""
    return f"{found['median']:.2f} ({found['lower_quartile']:.2f}-{found['upper_quartile']:.2f})"
