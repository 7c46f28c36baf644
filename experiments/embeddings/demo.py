"""`value_for` on the demo's own training: its targets valued afterwards, beside their values computed while it ran.

The curves of the report, which `assay train --embeddings` draws at the end, are left out: they are not measured here.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import torch

import assay
from assay.demo import CORPUS, SETTINGS
from assay.train import load_config, train
from assay.train.loop import prepare, token_mean_loss
from experiments.command import run_parts_as_command
from experiments.embeddings.common import spearman

STEPS, SEED = 30, 0
TABLE = "token.weight"  # of the tokens, which is the head as well


def recorded(**settings: Any) -> list[dict[str, Any]]:
    """Spearman by target, under settings of `attribution` beside the demo's own."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", assay.AssayWarning)
        base = {
            "out": Path(folder) / "run", "data.path": CORPUS, "device": "cpu", "seed": SEED, "train.steps": STEPS,
            "attribution.measure_every": 0, "attribution.embeddings": True,
        }  # fmt: skip
        config = load_config(SETTINGS, base | {f"attribution.{name}": x for name, x in settings.items()})
        with patch("assay.train.loop._keep_curves"):
            ledger = train(config).ledger
        stored = sum(
            p.stat().st_size for p in (Path(folder) / "run" / "embeddings").rglob("*") if p.is_file()
        )
        setup, path, table = prepare(config), config.attribution.path, []
        for name, batch in setup.targets.items():
            found = ledger.value_for(assay.Target([batch], token_mean_loss), setup.model, path)  # type: ignore[arg-type]
            online = ledger.steps(name)
            summed = [f.group_by("id").agg(pl.col("value").sum()).sort("id") for f in (found, online)]
            by_id, by_row = (
                spearman(*(torch.tensor(f["value"].to_list()) for f in frames))
                for frames in (summed, (found, online))
            )
            table.append(
                {
                    "target": name,
                    "path": path,
                    "by_id": by_id,
                    "by_row": by_row,
                    "stored_per_row": stored // len(found),
                }
            )
        return table


PARTS = {
    "assay train --embeddings": recorded,
    "rank 48": partial(recorded, rank=48),
    "rank 48, table of the tokens at 64": partial(recorded, rank=48, ranks={TABLE: 64}),
    "rank 48, table of the tokens at 128": partial(recorded, rank=48, ranks={TABLE: 128}),
    "rank 64, table of the tokens at 128": partial(recorded, rank=64, ranks={TABLE: 128}),
}


if __name__ == "__main__":
    run_parts_as_command(
        "embeddings_demo",
        "embeddings.demo",
        PARTS,
        {"training": f"the demo's settings, {STEPS} steps of 12 documents", "seed": SEED},
    )
