"""The account of the demo's whole training, by path."""

from __future__ import annotations

from typing import Any

import polars as pl

from experiments.command import run_as_command
from experiments.paths.demo import METHODS, one

SHOWN = ("left", "trapezoid", "simpson, tolerance 0.02")


def experiment() -> dict[str, Any]:
    """Explained share of every target's drop from the first step to the last."""
    table: list[dict[str, Any]] = []
    for name in SHOWN:
        config, found = one(METHODS[name], steps=None)
        for target, share in found["explained"].items():
            drop = found["lines"].filter(pl.col("target") == target)["actual"].sum()
            table.append(
                {
                    "method": name,
                    "target": target,
                    "explained": share,
                    "drop": drop,
                    "points": found["points"],
                }
            )
        steps = found["lines"]["step"].n_unique()
    return {
        "training": f"the demo's settings (learning rate {config.train.learning_rate}, AdamW, clipping, decay), all "
        f"{steps} steps of {config.train.batch_size} documents",
        "seed": 0,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("demo_whole", "paths.demo_whole", experiment)
