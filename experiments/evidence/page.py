"""Sections of `docs/results.md` on whether values are of any use, each in the shape of `experiments.evidence.shape`.

A section is on the page as soon as its result is there.
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.command import RESULTS
from experiments.evidence import text_page, truth_page
from experiments.tables import Result

__all__ = ["PLOTS", "SECTIONS"]

SECTIONS: dict[str, Callable[[Result], str]] = {
    name: section
    for name, section in (truth_page.SECTIONS | text_page.SECTIONS).items()
    if (RESULTS / f"{name}.json").exists()
}
PLOTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    file: (name, draw) for file, (name, draw) in text_page.PLOTS.items() if name in SECTIONS
}
