"""`assay adjoint` on a run of `assay train`: the run's own order, model and loss, found again from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import assay
from assay.cli import main
from assay.errors import InputError
from assay.report import write
from assay.serve.search import make_searcher
from assay.train import load_config, train
from assay.train.model import token_mean_loss
from assay.train.replay import adjoint_of_run, rerun
from tests.corpus import write_documents


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = write_documents(tmp_path / "texts.jsonl", 60, 100)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"out: {tmp_path / 'run'}\ndata: {{path: {data}}}\n"
        "model: {context: 32, vocabulary: 300, layers: 1, heads: 2, width: 16}\n"
        "train: {batch_size: 8, accumulate: 2, epochs: 2}\n"
        "targets: {documents: 3}\nattribution: {measure_every: 3, snapshots: auto, embeddings: true}\n"
    )
    return path


def test_the_command_gives_the_exact_values_of_the_run(config: Path, tmp_path: Path, capsys: Any) -> None:
    train(load_config(config))
    make_searcher(assay.open(tmp_path / "run"), build=True, rank=2)
    with pytest.raises(SystemExit) as left:
        main(["adjoint", str(tmp_path / "run"), "--top", "2"])
    out, err = capsys.readouterr()
    assert not left.value.code, err
    assert "held_out" in out
    methods = {"in-run values", "embeddings", "influence functions"}
    assert all(name in out for name in methods)
    assert "not compared" not in out
    written = pl.read_parquet(tmp_path / "run" / "adjoint.parquet")
    ledger = assay.open(tmp_path / "run")
    assert set(written["id"]) == set(ledger.rows["id"])

    again = rerun(ledger)
    values = ledger.adjoint(
        again.model, again.optimizer, again.batches_of_step, token_mean_loss, again.targets
    )
    summed = dict(written.iter_rows())
    rows = ledger.rows.with_columns(value=pl.Series(values[0].double().tolist()))
    for id_, value in rows.group_by("id").agg(pl.col("value").sum()).iter_rows():
        assert summed[id_] == pytest.approx(value, rel=1e-9)
    kept = ledger.table("agreement")
    assert set(kept["method"]) == methods
    # the same sign and the same rows; how much it is, is the run's own affair
    assert kept["by_id"].is_between(0.1, 1).all()
    correlation = ledger.agreement(values)["by_step"][0]
    assert kept.filter(method="in-run values")["by_step"][0] == pytest.approx(correlation)
    assert 0.2 < correlation <= 1
    assert "Which cheaper method to trust" in write(ledger, tmp_path).read_text(encoding="utf-8")


def test_only_runs_of_the_command_can_be_found_again(config: Path, tmp_path: Path) -> None:
    train(load_config(config, {"train.steps": 2}))
    ledger = assay.open(tmp_path / "run")
    with pytest.raises(InputError, match="no target 'law'"):
        adjoint_of_run(ledger, ["law"], {})
    _, documents, _ = adjoint_of_run(ledger, [], {"last": 1})
    assert set(documents["id"]) == set(ledger.rows.filter(step=1)["id"])
    model = torch.nn.Linear(2, 1)
    with assay.Run(model, torch.optim.SGD(model.parameters(), lr=0.1), snapshots=1) as run:
        pass
    with pytest.raises(InputError, match="not made by `assay train`"):
        rerun(run.ledger)
