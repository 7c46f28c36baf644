"""The account of the demo's own training, cut to its first steps, by path, and what a sketch shares out of it."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import polars as pl

import assay
from assay.demo import CORPUS, SETTINGS
from assay.train import load_config, train
from experiments.command import run_as_command

METHODS: dict[str, dict[str, Any]] = {
    "left": {"path": "left"},
    "trapezoid": {"path": "trapezoid"},
    "simpson": {"path": "simpson"},
    "simpson, tolerance 0.02": {"path": "simpson", "tolerance": 0.02},
    "trapezoid, sketch": {"path": "trapezoid", "momentum": "sketch"},
}
STEPS = 30


def one(options: dict[str, Any], steps: int | None = STEPS) -> tuple[Any, dict[str, Any]]:
    """The configuration of one run of so many steps (None for all), and what is shown of it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", assay.AssayWarning)
        settings = {
            "out": Path(folder) / "run", "data.path": CORPUS, "device": "cpu", "seed": 0, "train.steps": steps,
            "attribution.measure_every": 0, **{f"attribution.{k}": v for k, v in options.items()},
        }  # fmt: skip
        config = load_config(SETTINGS, settings)
        return config, shown(train(config).ledger)


def shown(ledger: assay.Ledger) -> dict[str, Any]:
    """What is shown of a run, read before its folder goes."""
    lines = pl.concat([ledger.account(t).with_columns(target=pl.lit(t)) for t in ledger.targets])
    points = ledger.table("quadrature")["points"] if "quadrature" in ledger.tables else None
    held = ledger.table("momentum")["bytes"][0] if "momentum" in ledger.tables else 0
    shares = {t: ledger.explained(t) for t in ledger.targets}
    return {
        "lines": lines,
        "points": None if points is None else points.mean(),
        "bytes": held,
        "explained": shares,
    }


def experiment() -> dict[str, Any]:
    """Explained share of every target's drop at the demo's learning rate."""
    table, carried, memory = [], {}, 0
    for name, options in METHODS.items():
        config, found = one(options)
        memory = max(memory, found["bytes"])
        for target, share in found["explained"].items():
            account = found["lines"].filter(pl.col("target") == target)
            carried[name, target] = account["carried"].abs().sum()
            table.append(
                {
                    "method": name,
                    "target": target,
                    "explained": share,
                    "drop": account["actual"].sum(),
                    "points": found["points"],
                }
            )
    shared = {
        target: 1 - carried["trapezoid, sketch", target] / carried["trapezoid", target]
        for name, target in carried
        if name == "trapezoid"
    }
    return {
        "training": f"the demo's settings (learning rate {config.train.learning_rate}, AdamW, clipping, decay), "
        f"{STEPS} steps of {config.train.batch_size} documents",
        "seed": 0,
        "table": table,
        "shared_out": shared,
        "sketch_bytes": memory,
    }


if __name__ == "__main__":
    run_as_command("demo", "paths.demo", experiment)
