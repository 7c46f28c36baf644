"""The forms of one layer's inner products, side by side: what each adds to the plain weight-gradient product.

For one linear layer with B samples of T positions, widths d → p and one target: the plain product; the batched form
with one sample's gradient after the other (in runs of eight and without), in blocks that stay in the last cache, and
all at once; and the directional form (one more product). One of each per round, in an order drawn for it (`rounds`);
ratios to the plain product are taken within a round; medians and quartiles. `assay bench calibrate` fits the cost
model's constants to a machine in the same way.

    python benchmarks/contractions.py           # two minutes; writes the JSON and the figures of decision 0019
    python benchmarks/contractions.py --quick   # two small layers, nothing written
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pages
import torch
from overhead import RESULTS, machine
from rounds import in_rounds, summary

from assay.capture import contraction
from assay.capture.calibration import QUICK
from assay.capture.contraction import SHIPPED, batched, per_sample_products
from assay.capture.layout import Layout

PAGE = "decisions/0019-form-large-gradients-one-by-one"
LAYERS = [  # B, T, d, p
    (16, 256, 384, 384), (16, 256, 384, 1152), (16, 256, 384, 1536), (16, 256, 1152, 384), (16, 256, 1536, 384),
    (4, 512, 768, 3072), (32, 64, 256, 1024), (32, 64, 1024, 256), (32, 64, 256, 256), (16, 128, 128, 512),
    (64, 256, 64, 64), (128, 32, 128, 128),
]  # fmt: skip
WHOLE = 1 << 60  # bytes: no block is as large
RUNS, ALONE, BLOCKS, WHOLE_BATCH = "in runs of 8", "each alone", "blocks of 10 MiB", "all at once"
FORMS = ("plain", RUNS, ALONE, BLOCKS, WHOLE_BATCH, "directional")


def forms(batch: int, positions: int, d: int, p: int) -> dict[str, Callable[[], Any]]:
    """The work of each form on random tensors."""
    a, b = torch.randn(batch, positions, d), torch.randn(batch, positions, p)
    directions, layout = torch.randn(1, p, d), Layout(0, batch)
    flat_a, flat_b, shipped = a.view(-1, d), b.view(-1, p), SHIPPED["cpu"]
    costs = {
        RUNS: replace(shipped, alone_bytes=1),
        BLOCKS: replace(shipped, alone_bytes=WHOLE),
        WHOLE_BATCH: replace(shipped, alone_bytes=WHOLE, block_bytes=WHOLE),
    }
    return {
        "plain": lambda: flat_b.t() @ flat_a,
        **{name: partial(batched, a, b, directions, cost) for name, cost in costs.items()},
        ALONE: lambda: without_runs(a, b, directions, costs[RUNS]),
        "directional": lambda: (flat_b.t() @ flat_a, per_sample_products(a, b, layout, directions)),
    }


def without_runs(*operands: Any) -> Any:
    """`batched` with a run for every sample."""
    with patch.object(contraction, "TOGETHER", 1):
        return batched(*operands)


def measure(layer: tuple[int, int, int, int], seconds: float) -> dict[str, Any]:
    """Ratios of each form to the plain product."""
    work = forms(*layer)
    taken = in_rounds(work, math.inf, warmup=1, least=3, limit=seconds)
    return {
        "layer": list(layer),
        "rounds": len(taken["plain"]),
        "plain": summary(taken["plain"]),
        "ratio": {
            name: summary([x / y for x, y in zip(times, taken["plain"], strict=True)])
            for name, times in taken.items()
        },
    }


def figures(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    used = document["machine"]
    lines = [
        "Time over that of the plain weight-gradient product, medians (quartiles), on "
        f"{used['threads']} threads of a CPU, torch {used['torch']}; in bold the form that is chosen.",
        "",
        f"| B, T, d → p | a gradient, MiB | plain, ms | {' | '.join(FORMS[1:])} |",
        "|---|---|---|" + "---|" * len(FORMS[1:]),
    ]
    for row in document["layers"]:
        batch, positions, d, p = row["layer"]
        chosen = RUNS if SHIPPED["cpu"].forms_alone(p, d, 4) else BLOCKS
        cells = [
            f"**{pages.spread(row['ratio'][name])}**" if name == chosen else pages.spread(row["ratio"][name])
            for name in FORMS[1:]
        ]
        size, plain = f"{4 * d * p / 2**20:.2f}", f"{1e3 * row['plain']['median']:.2f}"
        lines.append(f"| {batch}, {positions}, {d} → {p} | {size} | {plain} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every layer, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=12.0, help="for each layer")
    parser.add_argument("--out", type=Path, help="JSON file (results/contractions-cpu.json)")
    options = parser.parse_args(argv)
    options.device = "cpu"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [
        measure(layer, 0.2 if options.quick else options.seconds)
        for layer in (QUICK if options.quick else LAYERS)
    ]
    document = {"machine": machine(options), "settings": {"seconds": options.seconds}, "layers": rows}
    print(figures(document))
    out = options.out if options.out or options.quick else RESULTS / "contractions-cpu.json"
    pages.keep(document, out, "contractions", PAGE, figures)


if __name__ == "__main__":
    main()
