"""The part of `docs/performance.md` on memory, from what `memory.py` measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import table

RESULTS = Path(__file__).parent / "results"

FORMS = {"full": "`full`", "bfloat16": "`bfloat16`", "cpu": "`cpu`", "factors": "`factors`"}
ARMS = {
    "sgd left": 'SGD, `path="left"`',
    "adamw left": 'AdamW, `path="left"`',
    "adamw trapezoid": 'AdamW, `path="trapezoid"`',
}

HEAD = """## Memory: how a target's gradient is held

`InRunShapley(target_gradient=...)`: each target's gradient is a copy of the weights. `"full"` holds it as autograd
gives it; `"bfloat16"` in half of that; `"cpu"` in pinned host memory; `"factors"` as the activations and output
gradients of the validation pass where these are smaller. All but `"full"` write out one parameter at a time, and leave
out the copy that an optimizer's preconditioner makes of it
([decision 0018](decisions/0018-hold-a-targets-gradient-in-a-form-of-choice.md)).
"""


def section() -> str:
    """The tables of every device that was measured; only what the forms are where none was."""
    files = sorted(RESULTS.glob("memory-*.json"))
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    parts = [part(file, document) for file, document in zip(files, documents, strict=True)]
    return "\n".join(
        [HEAD, *(parts or ["Not measured with this version yet: `python benchmarks/memory.py`.\n"])]
    )


def part(file: Path, document: dict[str, Any]) -> str:
    """The tables of one device."""
    machine, found = document["machine"], document["peaks"]
    device = file.stem.removeprefix("memory-")
    size = "B {batch}, T {context}, d {width}, {layers} layers".format(**found["size"])
    weights = f"{found['weights_bytes'] / 1e6:.0f} MB"
    moves = (
        " On a CPU `cpu` moves nothing: its figures are those of a gradient that is read one parameter at a time."
        if device == "cpu"
        else ""
    )
    lines = [
        f"Peak beyond the plain step, in copies of the weights ({weights}). A GPT of {size}, "
        f"one held-out sequence, float32; AdamW with `memory=\"recompute\"`, so that no per-sample gradients are in it."
        f"{moves}\n",
        _peaks(found["rows"]),
        _errors(document["errors"]),
        _truncated(document["truncated"]),
        f"`python benchmarks/memory.py` · {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, Python {machine['python']} · {document['took_seconds']} s\n",
    ]  # fmt: skip
    return "\n".join(lines)


def _peaks(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for arm, name in ARMS.items():
        for checkpoints in (False, True):
            cells = {
                row["form"]: row["copies"]
                for row in rows
                if (row["arm"], row["checkpoints"]) == (arm, checkpoints)
            }
            lines.append([name, "on" if checkpoints else "off", *(f"{cells[form]:+.2f}" for form in FORMS)])
    return table(["", "activation checkpoints", *FORMS.values()], lines)


def _errors(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            f'{row["run"]}, `path="{row["path"]}"`, {row["steps"]} steps',
            f"{row['rank_correlation']:.6f}",
            f"{row['explained']:.4f}",
            f"{row['gap']:.1e}",
        ]
        for row in rows
    ]
    head = [
        "bfloat16 beside full",
        "rank correlation of values",
        "account explains (full)",
        "change of that share",
    ]
    return "What rounding changes, of several targets the worst:\n\n" + table(head, lines)


def _truncated(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["rank"],
            f"{row['share_of_memory']:.0%}".replace("%", " %"),
            f"{row['error']:.2%}".replace("%", " %"),
            f"{row['share_of_pass']:.1f}",
        ]
        for row in rows
    ]
    head = ["rank", "memory of the matrices", "error of the values", "time, in validation passes"]
    return (
        "A truncated rank is not offered. What it would do, each matrix of the gradient by its leading singular "
        "vectors:\n\n" + table(head, lines)
    )
