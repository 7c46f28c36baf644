"""Put the committed results of the fault campaign and of the ten million rows into `docs/robustness.md`.

python tests/faults/campaign.py --kills 200 --out benchmarks/results/faults.json
python benchmarks/rows.py
python scripts/robustness.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "robustness.md"
RESULTS = ROOT / "benchmarks" / "results"
WORK = {
    "run": "a training run with in-run values",
    "record": "a training run with recorded gradients and snapshots",
    "index": "the build of an index",
    "embedding": "a pass of embeddings",
}


def faults(found: dict[str, Any]) -> str:
    """Kills and ends by kind of work, as a table."""
    counts = ("kills", "acknowledged", "lost", "ended the same")
    lines = [
        "| work | kills | steps or rows acknowledged, over all kills | of these lost | pieces ended as unbroken ones |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {text} | {' | '.join(str(found[kind].get(count, 0)) for count in counts)} |"
        for kind, text in WORK.items()
    ]
    kills, lost = (sum(found[kind].get(count, 0) for kind in WORK) for count in ("kills", "lost"))
    return "\n".join([*lines, "", f"{kills} kills, {lost} lost (`{found['command']}`)."])


def rows(found: dict[str, Any]) -> str:
    """Seconds and peak memory by number of rows, as a table."""
    lines = ["| rows | on disk | write | search | aggregate |", "| --- | --- | --- | --- | --- |"]
    for run in found["runs"]:
        cells = [
            f"{run[stage]['seconds']:.1f} s, {run[stage]['peak_resident'] / 2**20:,.0f} MiB"
            for stage in ("write", "search", "aggregate")
        ]
        lines.append(f"| {run['rows']:,} | {run['bytes'] / 2**20:,.0f} MiB | {' | '.join(cells)} |")
    machine = found["machine"]
    note = (
        f"`{found['command']}` on {machine['cpu']}, {machine['threads']} threads, rows as {found['dtype']}."
    )
    return "\n".join([*lines, "", note])


def page(text: str) -> str:
    """The page with each table between its marks; a result that is not there leaves its place as it is."""
    for name, table in (("faults", faults), ("rows-cpu", rows)):
        path = RESULTS / f"{name}.json"
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        after = rest.split(end)[1]
        inside = f"\n{table(json.loads(path.read_text()))}\n\n" if path.exists() else "\n"
        text = f"{before}{start}{inside}{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
