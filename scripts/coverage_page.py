"""docs/coverage.md from experiments/results/coverage.jsonl, without trying anything.

python scripts/coverage_page.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "RESULTS", "ROUNDING", "page", "read"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "coverage.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
ROUNDING = 1e-9, 1e-5  # float64 throughout; float32 somewhere inside the model

TITLES = {
    "wrong": "Wrong",
    "failed": "Failed",
    "refused": "Refused, and why",
    "fallback": "Exact with a named fallback",
    "fast path": "Exact by the fast path",
    "not tiny": "Not compared: not tiny",
    "not built": "Not compared: not built",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the results were made with, and what came of each family."""
    made, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return made, {row.pop("family"): row for row in rows}


def page(path: Path) -> str:
    """The page of a file of results."""
    made, results = read(path)
    kinds = Counter(row["kind"] for row in results.values())
    tried = sum(kinds[kind] for kind in ("fast path", "fallback", "refused", "failed", "wrong"))
    left = made["model_types"] - len(results)
    lines = [
        "# Coverage of transformers",
        "",
        f"Written by `python scripts/coverage.py` with transformers {made['transformers']} and torch "
        f"{made['torch']}. Every model type that can be made small was built with random weights: by "
        "the usual names of sizes, else by dividing every width of its default configuration by the same number. Its "
        "inputs are random; where a model takes images or sound in a form of its own, it was compared on text alone, "
        "as the table says. The per-sample gradients of every parameter were compared with autograd on single samples "
        "in float64.",
        "",
        f"Of {len(results)} model types {tried} were compared: **{kinds['fast path']} exact by the fast path, "
        f"{kinds['fallback']} exact with a named fallback for some parameters, {kinds['refused']} refused, "
        f"{kinds['failed']} failed, {kinds['wrong']} wrong.** The others were not compared: {kinds['not tiny']} are "
        f"too large for this command, {kinds['not built']} need a configuration, inputs or a library that it "
        "does not have" + (f", and {left} were not tried yet." if left else "."),
        "",
        "Why a family was not compared says what stood in the way of the first small model that was tried: mostly a "
        "size that has to agree with another one of the configuration, inputs of a form of their own (several images "
        "packed into one dimension, with `grid_thw`), a library that is not installed, or a part of a model that has "
        "no class of its own. It says nothing against the family: the start-up check tells at the first step of a run "
        "whether it is exact there.",
        "",
        f"An error below {ROUNDING[0]:g} is float64 rounding; one up to {ROUNDING[1]:g} comes from models that cast to "
        "float32 inside (norms, routers, scans).",
        "",
    ]
    for kind, title in TITLES.items():
        rows = {family: row for family, row in sorted(results.items()) if row["kind"] == kind}
        if rows:
            lines += [f"## {title}", "", *_table(kind, rows), ""]
    return "\n".join(lines)


def _table(kind: str, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    if kind in ("fast path", "fallback", "wrong"):
        head = ["| family | inputs | largest relative error | parameters |", "|---|---|---|---|"]
        return head + [
            f"| {f} | {', '.join(r['inputs'])} | {r['error']:.1e} | {_ways(r['ways'])} |"
            for f, r in rows.items()
        ]
    return ["| family | why |", "|---|---|", *(f"| {f} | {r['why']} |" for f, r in rows.items())]


def _ways(ways: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))


if __name__ == "__main__":
    PAGE.write_text(page(RESULTS), encoding="utf-8")
