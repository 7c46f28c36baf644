"""Sections of `docs/results.md` on whether values are of any use, each in the shape of `experiments.evidence.shape`.

A section is on the page as soon as its result is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from experiments.command import RESULTS
from experiments.evidence import EXPERIMENTS, text_page, truth_page
from experiments.tables import Result, table

__all__ = ["PLOTS", "SECTIONS"]


def taken(r: Result) -> str:
    """What all of the evidence takes, and its quick form."""
    left = [json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("*.json")]
    by_command = {found["command"]: found for found in left}
    rows, seconds = [], 0.0
    for name in EXPERIMENTS:
        command = f"python -m experiments.evidence.{name}"
        found = by_command[command]
        seconds += found["seconds"]
        rows.append(
            [f"`{command}`", len(found["seeds"]), f"{found['seconds']:,.0f}", f"{r['experiments'][name]:.0f}"]
        )
    rows.append(["together", "", f"{seconds:,.0f}", f"{sum(r['experiments'].values()):.0f}"])
    return (
        "## What the evidence takes\n\nThe sections from here to *What every method costs*, each by its command; "
        "`python -m experiments.evidence` runs them one after the other, `--quick` a smaller form of each, which the "
        "tests run and look through as well (`tests/experiments/test_quick.py`). Seconds of "
        "the processor with one thread, which is the wall time on one idle core (the full form's without the import of "
        "the libraries, and without retrainings that were found in a cache). "
        f"The whole set takes {seconds / 60:.0f} minutes of one core, the quick form "
        f"{sum(r['experiments'].values()) / 60:.1f}; the bounds are three hours of two cores, and five minutes.\n\n"
        + table(["command", "seeds", "seconds", "`--quick`, seconds"], rows)
    )


SECTIONS: dict[str, Callable[[Result], str]] = {
    name: section
    for name, section in ({"quick": taken} | truth_page.SECTIONS | text_page.SECTIONS).items()
    if (RESULTS / f"{name}.json").exists()
}
PLOTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    file: (name, draw) for file, (name, draw) in text_page.PLOTS.items() if name in SECTIONS
}
