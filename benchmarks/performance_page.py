"""`docs/performance.md` and its plot, from what `performance.py` measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import allocator_page
import memory_page
import pages
from pages import table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PAGE, PLOT = DOCS / "performance.md", DOCS / "performance.svg"

NAMES = {
    "plain": "plain step", "pass": "and a bare validation pass", "assay": "`path=\"left\"`",
    "assay left@4": "`path=\"left\"`, `refresh=4`", "assay trapezoid": "`path=\"trapezoid\"`",
    "assay simpson": "`path=\"simpson\"`", "assay hessian": "`path=\"hessian\"`",
    "record 16": "recording embeddings, rank 16", "record 16:64": "recording embeddings, rank 16, support 64",
    "record 64": "recording embeddings, rank 64", "record 64:128": "recording embeddings, rank 64, support 128",
    "direct": "direct: one sample at a time", "func": "`torch.func`: per-sample gradients",
    "opacus": "opacus: norms of per-sample gradients, no values",
    "dattri-llm": "dattri-llm: scores against a validation batch",
}  # fmt: skip

HEAD = """# Performance

What values cost beside a training step: a forward and backward pass, the optimizer's step. All arms of a model and
optimizer run in one process, which [keeps freed memory](#memory-that-is-given-back-and-faulted-in-again), one step of
each per round in an order drawn for it; a ratio is taken within a round, to the plain step. Figures are medians, with
quartiles in brackets, and behind the semicolon the same of the quickest steps, which what else the machine does touches
least. `python benchmarks/performance.py` makes this page anew; `assay bench overhead` measures sizes of your choice,
with memory, and `assay bench calibrate` fits the choice between contractions to your machine.

The floor of the first order is the validation pass, one gradient of the target's loss per step; `refresh=k` takes it
every k-th step only ([what the account then says](what-the-number-means.md)).

No step waits for the device: scores, norms and learning rates stay there and are moved in bulk every 64 steps, and
recorded rows leave by copies that another thread waits for. Four choices do wait, for what they are: the first step
looks whether the target's loss is a number, a `tolerance` looks after every point whether it is met,
`memory="recompute"` looks whether a repeated pass was a repetition, and of a fused optimizer under a `GradScaler` is
asked whether the scaler passes over the step (as the scaler itself asks for other optimizers).
"""
NO_GPU = """## On a GPU

**Nothing here is from a GPU**: none was at hand. The fused kernel for GPUs
([0017](decisions/0017-sum-and-dot-in-one-kernel.md)) was run in an interpreter and compiled; its speed is unknown.
Where there is a GPU, `python benchmarks/performance.py --device cuda` fills this section in: GPT-2 small at T 1024 and
B 16, eager and compiled, and Llama's shape at 8 billion parameters with activation checkpointing.
"""
spread = partial(pages.spread, to=" to ")
KINDS = {
    "assay left": NAMES["assay"], "assay left@4": NAMES["assay left@4"], "assay trapezoid": NAMES["assay trapezoid"],
    "assay trapezoid:reduced": '`path="trapezoid"`, `memory="reduced"`',
    **{kind: NAMES[kind] for kind in ("plain", "pass", "direct")},
}  # fmt: skip


def with_quickest(row: dict[str, Any], above: bool = False) -> str:
    """Median and quartiles of the ratio, or of what is above the bare pass, and the same of the quickest steps."""
    key, sign = ("above_pass", "+") if above else ("ratio", "")
    quickest = format(row["quickest_above_pass" if above else "quickest"], f"{sign}.2f")
    return f"{spread(row[key], sign)}; {quickest}"


def size_of(row: dict[str, Any]) -> str:
    """B, T, d and layers."""
    return "B {batch}, T {context}, d {width}, {layers} layers".format(**row["size"])


def main_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every arm on the main size, by optimizer."""
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    found = {(row["optimizer"], row["arm"]): row for row in rows}
    names = {"sgd": "SGD", "adamw": "AdamW"}
    head = [
        "",
        *(f"{names[o]}: ratio" for o in optimizers),
        *(f"{names[o]}: above the bare pass" for o in optimizers),
    ]
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        ratios = [with_quickest(found[o, arm]) if arm != "plain" else "1" for o in optimizers]
        above = ["" if arm in ("plain", "pass") else with_quickest(found[o, arm], True) for o in optimizers]
        lines.append([NAMES[arm], *ratios, *above])
    return table(head, lines)


def peers_of(rows: Sequence[dict[str, Any]], left_out: dict[str, str]) -> list[str]:
    """What the arms of other libraries are, and which there are not."""
    text = (
        "Other libraries' nearest work, on the same model with a head of its own weight: opacus forms the norms of the "
        "samples' gradients (ghost norm) in the backward pass, dattri-llm their inner products with the gradient of a "
        "validation batch.\n"
    )
    known = [text] if any(row["arm"] in ("opacus", "dattri-llm") for row in rows) else []
    return known + [f"Without {name}: {why}.\n" for name, why in left_out.items()]


def others_table(rows: Sequence[dict[str, Any]]) -> str:
    """The first order on other models and sizes."""
    lines = []
    for key in dict.fromkeys((row["family"], size_of(row)) for row in rows):
        found = {row["arm"]: row for row in rows if (row["family"], size_of(row)) == key}
        first, direct = found["assay"], found["direct"]
        lines.append(
            [key[0], key[1], with_quickest(found["pass"]), with_quickest(first), with_quickest(first, True),
             with_quickest(direct)]
        )  # fmt: skip
    head = ["blocks", "size", "bare pass", '`path="left"`', "above the bare pass", "one sample at a time"]
    return table(head, lines)


def slopes_table(slopes: Sequence[dict[str, Any]]) -> str:
    """What the first order adds over samples, tokens and targets."""
    lines = []
    for found in slopes:
        points = ", ".join(
            f"{n}: {1e3 * added:.1f}"
            for n, added in zip(found["numbers"], found["added_seconds"], strict=True)
        )
        lines.append(
            [
                found["along"],
                points,
                f"{1e3 * found['slope']:.3f}",
                f"{1e3 * found['intercept']:.1f}",
                f"{found['r2']:.3f}",
            ]
        )
    return table(["along", "milliseconds added", "per one more", "fixed", "R²"], lines)


def slower_than_direct(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each configuration in which the first order takes longer than one sample at a time."""
    found = {(row["table"], row["family"], size_of(row), row["optimizer"], row["arm"]): row for row in rows}
    sentences = []
    for key, row in found.items():
        bare, direct = (found[(*key[:-1], arm)]["ratio"]["median"] for arm in ("pass", "direct"))
        if key[-1] == "assay" and row["ratio"]["median"] > direct:
            sentences.append(
                f"Slower than one sample at a time: {key[1]}, {key[2]}, {key[3]}, by "
                f"{row['ratio']['median'] / direct - 1:.0%}. The step and a bare validation pass alone take "
                f"{bare / direct:.0%} of that loop's time: in micro-batches of one, training itself is faster there."
            )
    return sentences


def first_order() -> str:
    """What `overhead.py` measured: few arms side by side, so that one does not cost another its caches."""
    file = RESULTS / "overhead-gpt2-cpu.json"
    if not file.exists():
        return ""
    document = json.loads(file.read_text(encoding="utf-8"))
    arms = ("pass", "assay", "assay left@4")
    found = {(tuple(row["size"].values()), row["optimizer"], row["arm"]): row for row in document["rows"]}
    models = dict.fromkeys((size, optimizer) for size, optimizer, _ in found)
    lines = []
    for size, optimizer in models:
        plain, *rows = (found[size, optimizer, arm] for arm in ("plain", *arms))
        peaks = [row["peak_bytes"] for row in (plain, *rows)]
        memory = "" if None in peaks else f"{peaks[2] / peaks[0]:.2f}"
        above = f"{spread(rows[1]['above_pass'], '+', 3)}; {rows[1]['quickest_above_pass']:+.3f}"
        ratios = [spread(row["ratio"], digits=3) for row in rows]
        lines.append([f"{size_of(plain)}, {optimizer}", ratios[0], ratios[1], above, ratios[2], memory])
    head = [
        "blocks of GPT-2",
        *(NAMES[arm] for arm in arms[:2]),
        "above the bare pass",
        NAMES[arms[2]],
        "peak memory",
    ]
    rounds = document["settings"]["rounds"]
    settings = (
        f"{rounds} rounds of these arms alone; medians (quartiles), and what is above the bare "
        "pass also of the quickest steps. Under AdamW the samples' gradients wait for the optimizer's step, whose "
        "second moment contains this very gradient: they are written to memory and read once more "
        "([0002](decisions/0002-keep-per-sample-gradients-for-adam.md))."
    )
    command = (
        f"`python benchmarks/overhead.py --size 16x256x384 --family gpt2 --rounds {rounds} --path left@4`\n"
    )
    return "\n".join([f"## The first order\n\n{settings}\n", table(head, lines), command])


def on_a_gpu(document: dict[str, Any] | None) -> str:
    """What a GPU takes for each arm of each model."""
    if document is None:
        return NO_GPU
    lines = []
    for row in document["rows"]:
        shape = "{family}, B {batch}, T {context}, d {width}, {layers} layers".format(**row["shape"])
        model = [shape, row["optimizer"], "compiled" if row["compiled"] else "eager", KINDS[row["arm"]]]
        if "failed" in row:
            lines.append([*model, "did not run", row["failed"], ""])
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        lines.append([*model, f"{1e3 * row['seconds']['median']:.1f}", spread(row["ratio"]), peak])
    head = ["model", "optimizer", "", "", "milliseconds", "ratio", "peak GiB"]
    machine = document["machine"]
    where = f"{machine['gpu']}, torch {machine['torch']}"
    command = f"`python benchmarks/performance.py --device cuda` · {where} · {document['took_seconds']} s\n"
    return "\n".join(["## On a GPU\n", table(head, lines), command])


def page(document: dict[str, Any] | None, gpu: dict[str, Any] | None = None) -> str:
    """The page; without its tables where nothing was measured."""
    if document is None:
        return f"{HEAD}\nNothing was measured with this version yet.\n\n{on_a_gpu(gpu)}"
    rows = document["rows"]
    main = [row for row in rows if row["table"] == "main"]
    slower = slower_than_direct(rows)
    verdict = " ".join(slower) if slower else (
        "In no configuration is the first order slower than a loop over single samples."
    )  # fmt: skip
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}"
    parts = [
        HEAD,
        first_order(),
        f"## Every path\n\nA GPT of {size_of(main[0])}, one held-out sequence.\n",
        main_table(main),
        *peers_of(main, document.get("left_out", {})),
        "![Time of each arm over the plain step](performance.svg)\n",
        "## Other models and sizes\n\nSGD, blocks of GPT-2 and Llama with random weights.\n",
        others_table([row for row in rows if row["table"] == "others"]),
        verdict + "\n",
        "## Over samples, tokens and targets\n\nWhat `path=\"left\"` adds to the plain step, its validation pass "
        "with it, and the least-squares line through that.\n",
        slopes_table(document["slopes"]),
        f"`python benchmarks/performance.py` · {where} · {document['took_seconds']} s\n",
        memory_page.section(),
        allocator_page.section(),
        on_a_gpu(gpu),
    ]  # fmt: skip
    return "\n".join(parts)


def plot(document: dict[str, Any]) -> str:
    """Horizontal bars: the median ratio of each arm under each optimizer, with its quartiles."""
    rows = [row for row in document["rows"] if row["table"] == "main" and row["arm"] != "plain"]
    top = max(row["ratio"]["upper_quartile"] for row in rows)
    x = lambda ratio: 250 + 430 * ratio / top  # noqa: E731
    height = 40 + 18 * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="720" height="{height}" fill="white"/>',
    ]
    for n, row in enumerate(rows):
        y, ratio = 20 + 18 * n, row["ratio"]
        colour = "#4878a8" if row["optimizer"] == "sgd" else "#c87838"
        name = NAMES[row["arm"]].replace("`", "").replace('"', "")
        parts += [
            f'<text x="242" y="{y + 11}" text-anchor="end">{name}, {row["optimizer"]}</text>',
            f'<rect x="250" y="{y}" width="{x(ratio["median"]) - 250:.1f}" height="13" fill="{colour}"/>',
            f'<path d="M{x(ratio["lower_quartile"]):.1f} {y + 6.5}H{x(ratio["upper_quartile"]):.1f}" stroke="black"/>',
        ]
    parts.append(f'<path d="M{x(1):.1f} 14V{height - 16}" stroke="black" stroke-dasharray="3 3"/>')
    parts.append(f'<text x="{x(1):.1f}" y="{height - 4}" text-anchor="middle">plain step</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def documents() -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What was measured on a CPU and on a GPU, and is committed."""
    files = (RESULTS / f"performance-{kind}.json" for kind in ("cpu", "cuda"))
    cpu, gpu = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else None for file in files)
    return cpu, gpu


def write(document: dict[str, Any] | None, gpu: dict[str, Any] | None = None) -> None:
    """The page and its plot."""
    PAGE.write_text(page(document, gpu), encoding="utf-8")
    if document is not None:
        PLOT.write_text(plot(document), encoding="utf-8")
