"""The part of `docs/performance.md` on the memory allocator, from what `allocator.py` measured."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pages

FILE = Path(__file__).parent / "results" / "allocator-cpu.json"
ARMS = {"plain": "plain step", "pass": "and a bare validation pass", "assay": '`path="left"`'}
NAMES = {"sgd": "SGD", "adamw": "AdamW"}
spread = partial(pages.spread, to=" to ")
HEAD = """## Memory that is given back, and faulted in again

On Linux, glibc gives freed memory at the end of its heap back to the system, and the next step faults it in again, page
by page. How often depends on where the arrays happen to lie; a validation pass between the steps makes it more, with
assay or without. Two environment variables keep the memory, at the price that the process holds its peak:

```console
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1099511627776
```
"""


def section() -> str:
    """The advice, and the table where it was measured."""
    if not FILE.exists():
        return HEAD
    return f"{HEAD}\n{part(json.loads(FILE.read_text(encoding='utf-8')))}"


def part(document: dict[str, Any]) -> str:
    """The table, and how it was made."""
    rows = {(row["optimizer"], row["allocator"], row["arm"]): row for row in document["rows"]}
    size = "B {batch}, T {context}, d {width}, {layers} layers".format(**document["rows"][0]["size"])
    machine, settings = document["machine"], document["settings"]
    head = [
        "",
        "page faults",
        "system time, ms",
        "ratio",
        "above the pass",
        "kept: page faults",
        "kept: ratio",
        "kept: above the pass",
        "kept over default",
    ]
    lines = []
    for optimizer, arm in dict.fromkeys((optimizer, arm) for optimizer, _, arm in rows):
        usual, kept = rows[optimizer, "default", arm], rows[optimizer, "kept", arm]
        lines.append(
            [
                f"{NAMES[optimizer]}: {ARMS[arm]}",
                f"{usual['faults']:,.0f}",
                f"{1e3 * usual['system_seconds']:.0f}",
                *_ratios(usual),
                f"{kept['faults']:,.0f}",
                *_ratios(kept),
                spread(kept["of_default"]),
            ]
        )
    return (
        f"Blocks of GPT-2, {size}; each arm in a process of its own, a step of each in turn, in an order drawn for "
        f"each of {settings['rounds']} rounds; ratios to the plain step with the same memory, medians (quartiles).\n\n"
        f"{pages.table(head, lines)}\n`python benchmarks/allocator.py` · {machine['cpu']}, {machine['threads']} "
        f"threads, torch {machine['torch']}\n"
    )


def _ratios(row: dict[str, Any]) -> tuple[str, str]:
    """Ratio to the plain step, and what is above the bare pass."""
    plain = row["arm"] == "plain"
    return (
        "1" if plain else spread(row["ratio"]),
        spread(row["above_pass"], "+") if row["arm"] == "assay" else "",
    )
