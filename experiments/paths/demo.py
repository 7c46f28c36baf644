"""The account of the demo's own training, cut to its first steps, by path."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import assay
from assay.demo import CORPUS, SETTINGS
from assay.train import load_config, train
from experiments.paths.common import run_as_command

PATHS = ("left", "trapezoid", "simpson")
STEPS = 30


def experiment() -> dict[str, Any]:
    """Explained share of every target's drop at the demo's learning rate."""
    table = []
    for path in PATHS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", assay.AssayWarning)
            out = Path(folder) / "run"
            settings = {
                "out": out, "data.path": CORPUS, "device": "cpu", "seed": 0, "train.steps": STEPS,
                "attribution.path": path, "attribution.measure_every": 0,
            }  # fmt: skip
            config = load_config(SETTINGS, settings)
            ledger = train(config).ledger
            for target in ledger.targets:
                account = ledger.account(target)
                table.append(
                    {
                        "path": path,
                        "target": target,
                        "explained": ledger.explained(target),
                        "drop": account["actual"].sum(),
                    }
                )
    return {
        "training": f"the demo's settings (learning rate {config.train.learning_rate}, AdamW, clipping, decay), "
        f"{STEPS} steps of {config.train.batch_size} documents",
        "seed": 0,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("demo", experiment)
