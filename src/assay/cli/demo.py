"""``assay demo``: the whole way on the embedded corpus, in a few minutes on a laptop."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer

from assay.cli.options import Debug, Device, Seed
from assay.cli.train import run_and_report

__all__ = ["demo"]

QUICK: dict[str, Any] = {
    "data.limit": 400,
    "train.epochs": 2,
    "model.vocabulary": 1024,
    "model.context": 96,
    "model.layers": 2,
    "model.width": 64,
    "data.long": "cut",
    "targets.documents": 2,
    "attribution.measure_every": 10,
}
"""What ``--quick`` changes: enough to see that everything runs, too little to learn much."""


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder [default: the next free runs/demo…].")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds in place of a few minutes.")] = False,
    device: Device = None,
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Train a small GPT on seven domains of real text and see what every document was worth.

    Takes a few minutes on two CPU cores and needs no network.

    Example: assay demo --out runs/first
    """
    from assay.demo import CORPUS, SETTINGS
    from assay.train import load_config

    overrides = {"out": out or _free(), "data.path": CORPUS, "device": device, "seed": seed}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    run_and_report(load_config(SETTINGS, overrides | (QUICK if quick else {})))


def _free() -> Path:
    """The first of runs/demo, runs/demo-2, … that does not exist, so that no earlier run is in the way."""
    names = (Path("runs") / ("demo" if n == 1 else f"demo-{n}") for n in count(1))
    return next(path for path in names if not path.exists())
