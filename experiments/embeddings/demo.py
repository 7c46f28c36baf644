"""`value_for` on the demo's own training: its targets valued afterwards, beside their values computed while it ran."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import torch

import assay
from assay.demo import CORPUS, SETTINGS
from assay.train import load_config, train
from assay.train.loop import Setup, _embedding, prepare, token_mean_loss
from experiments.command import run_parts_as_command
from experiments.embeddings.common import spearman

STEPS, SEED = 30, 0


def recorded(change: Callable[[assay.DataValueEmbedding], assay.DataValueEmbedding]) -> list[dict[str, Any]]:
    """Spearman by target, with another method in the place of that of `assay train --embeddings`."""

    def instead(setup: Setup) -> list[assay.DataValueEmbedding]:
        return [change(method) for method in usual(setup)]

    usual = _embedding
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", assay.AssayWarning)
        settings = {
            "out": Path(folder) / "run", "data.path": CORPUS, "device": "cpu", "seed": SEED, "train.steps": STEPS,
            "attribution.measure_every": 0, "attribution.embeddings": True,
        }  # fmt: skip
        config = load_config(SETTINGS, settings)
        with patch("assay.train.loop._embedding", instead):
            ledger = train(config).ledger
        setup, path, table = prepare(config), config.attribution.path, []
        for name, batch in setup.targets.items():
            found = ledger.value_for(assay.Target([batch], token_mean_loss), setup.model, path)  # type: ignore[arg-type]
            online = ledger.steps(name)
            summed = [f.group_by("id").agg(pl.col("value").sum()).sort("id") for f in (found, online)]
            by_id, by_row = (
                spearman(*(torch.tensor(f["value"].to_list()) for f in frames))
                for frames in (summed, (found, online))
            )
            table.append({"target": name, "path": path, "by_id": by_id, "by_row": by_row})
        return table


def finer_table(method: assay.DataValueEmbedding) -> assay.DataValueEmbedding:
    """More axes for the table of the tokens, which is the head as well."""
    method.ranks["token.weight"] = 64
    return method


PARTS = {
    "assay train --embeddings": partial(recorded, lambda method: method),
    "the same, token table at rank 64": partial(recorded, finer_table),
    "DataValueEmbedding()": partial(recorded, lambda _: assay.DataValueEmbedding()),
}


if __name__ == "__main__":
    run_parts_as_command(
        "embeddings_demo",
        "embeddings.demo",
        PARTS,
        {"training": f"the demo's settings, {STEPS} steps of 12 documents", "seed": SEED},
    )
