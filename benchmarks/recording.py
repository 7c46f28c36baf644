"""What recording for data value embeddings adds to a training step, by rank and support: the table of its page.

Arms on the main size of `performance.py`, for SGD and AdamW: the plain step, and recordings (RANK or RANK:SUPPORT), one
step of each per round in an order that rotates; ratios within a round, medians and quartiles.

    python benchmarks/recording.py            # about five minutes on two cores; JSON and the table
    python benchmarks/recording.py --quick    # seconds, nothing written
    python benchmarks/recording.py --page     # the table alone, from the JSON
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import overhead
import performance
from performance_page import DOCS, spread, table

FORMS = ("16", "16:32", "16:64", "16:128", "64", "64:128")
PAGE = DOCS / "embeddings.md"
BEGIN, END = "<!-- figures of benchmarks/recording.py -->\n", "<!-- until here, recording -->\n"


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per optimizer and form."""
    size = performance.QUICK if options.quick else performance.MAIN
    found = []
    for optimizer in overhead.OPTIMIZERS:
        arms = {
            kind: performance.arm("gpt", size, optimizer, kind, options)
            for kind in ("plain", *(f"record {form}" for form in FORMS))
        }
        taken = performance.timed(arms, options, options.seconds / len(overhead.OPTIMIZERS))
        for kind, own in taken.items():
            ratios = [a / b for a, b in zip(own, taken["plain"], strict=True)]
            found.append(
                {
                    "size": size._asdict(), "optimizer": optimizer, "arm": kind, "rounds": len(own),
                    "seconds": overhead.summary(own), "ratio": overhead.summary(ratios),
                    "quickest": min(own) / min(taken["plain"]),
                }
            )  # fmt: skip
            print(optimizer, kind, spread(found[-1]["ratio"]), f"{found[-1]['quickest']:.3f}", flush=True)
    return found


def figures(document: dict[str, Any]) -> str:
    """The table, and where it was measured."""
    rows, machine = document["rows"], document["machine"]
    found = {(row["optimizer"], row["arm"]): row for row in rows}
    lines = []
    for form in FORMS:
        rank, _, support = form.partition(":")
        pair = [found[optimizer, f"record {form}"] for optimizer in overhead.OPTIMIZERS]
        lines.append([rank, support or "whole sides", *(spread(row["ratio"]) for row in pair)])
    size = "B {batch}, T {context}, d {width}, {layers} layers".format(**rows[0]["size"])
    head = ["rank", "support", "SGD: step over the plain step", "AdamW"]
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    return (
        f'Recording, `curvature="fisher"`, on a GPT of {size}; medians of {rows[0]["rounds"]} rounds (quartiles); '
        f"`python benchmarks/recording.py` · {where}.\n\n{table(head, lines)}"
    )


def write(document: dict[str, Any]) -> None:
    """The table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + figures(document) + END + rest.split(END)[1], encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(prog="recording", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny size; writes nothing")
    parser.add_argument("--page", action="store_true", help="write the table from the JSON, measure nothing")
    parser.add_argument("--seconds", type=float, default=270.0, help="about how long to measure")
    parser.add_argument("--rounds", type=int, default=40, help="of each arm at most")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    out = overhead.RESULTS / f"recording-{torch.device(options.device).type}.json"
    if options.quick:
        options.seconds, options.rounds = min(options.seconds, 2.0), min(options.rounds, 3)
    if not options.page:
        document = {"machine": overhead.machine(options), "rows": measure(options)}
        if options.quick:
            print(figures(document))
            return
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write(json.loads(out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
