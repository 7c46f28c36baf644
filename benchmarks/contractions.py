"""The forms of one layer's inner products, timed side by side, and the constants of the cost model that follow.

For one linear layer with B samples of T positions, widths d → p and one target: the plain weight-gradient product,
the batched form (per-sample gradients, summed and dotted) and the directional form (one more product). All three in
turn, medians over rounds. The last lines fit the cost model's two constants by the medians of what each form adds.

    python benchmarks/contractions.py           # about a minute; writes results/contractions-cpu.json
    python benchmarks/contractions.py --quick   # two small layers, nothing written
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from assay.capture.contraction import batched, cheapest, cost_model, per_sample_products
from assay.capture.layout import Layout

RESULTS = Path(__file__).parent / "results" / "contractions-cpu.json"
LAYERS = [  # B, T, d, p
    (16, 256, 384, 384), (16, 256, 384, 1152), (16, 256, 384, 1536), (16, 256, 1536, 384),
    (8, 512, 768, 3072), (16, 64, 384, 1536), (32, 16, 384, 384), (64, 1, 784, 512), (64, 4, 256, 256),
]  # fmt: skip
QUICK = [(4, 64, 64, 64), (64, 1, 64, 64)]


def forms(batch: int, positions: int, d: int, p: int) -> dict[str, Callable[[], Any]]:
    """The work of each form on random tensors."""
    a, b = torch.randn(batch, positions, d), torch.randn(batch, positions, p)
    directions, layout = torch.randn(1, p, d), Layout(0, batch)
    flat_a, flat_b = a.view(-1, d), b.view(-1, p)
    return {
        "plain": lambda: flat_b.t() @ flat_a,
        "batched": lambda: batched(a, b, directions, cost_model("cpu")),
        "directional": lambda: (flat_b.t() @ flat_a, per_sample_products(a, b, layout, directions)),
    }


def measure(layer: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """Median seconds of each form, and the constants that they imply."""
    work = forms(*layer)
    taken: dict[str, list[float]] = {name: [] for name in work}
    for run in range(rounds + 2):
        for name, body in work.items():
            start = time.perf_counter()
            body()
            if run >= 2:
                taken[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    batch, positions, d, p = layer
    more = {name: max(seconds[name] - seconds["plain"], 0.0) for name in ("batched", "directional")}
    return {
        "batch": batch, "positions": positions, "d": d, "p": p, "seconds": seconds,
        "per_entry": more["batched"] / (batch * p * d),
        "per_flop": more["directional"] / (2 * batch * positions * p * d),
        "cheaper": min(more, key=lambda name: more[name]),
        "chosen": cheapest(batch, positions, p, d, 1),
    }  # fmt: skip


def main() -> None:
    """Measure every layer, print, and write the JSON."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--quick", action="store_true")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    rows = [measure(layer, 3 if chosen.quick else 15) for layer in (QUICK if chosen.quick else LAYERS)]
    for row in rows:
        times = "  ".join(f"{name} {1e3 * seconds:8.2f} ms" for name, seconds in row["seconds"].items())
        size = f"B {row['batch']} T {row['positions']} {row['d']}→{row['p']}"
        print(f"{size:24s} {times}  cheaper: {row['cheaper']}, chosen: {row['chosen']}")
    fitted = {key: statistics.median(row[key] for row in rows) for key in ("per_entry", "per_flop")}
    print(f"cost model: {fitted}")
    if not chosen.quick:
        machine = {
            "cores": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(
            json.dumps({"machine": machine, "fitted": fitted, "layers": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
