"""`assay train --embeddings` and `assay influence`, on a few short documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import assay
from assay.cli import main
from assay.train import load_config
from assay.train.influence import influence_of_texts
from tests.corpus import write_documents


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_documents(folder / "texts.jsonl", 60, 100)
    (folder / "mine.yaml").write_text(
        f"out: {folder / 'run'}\n"
        f"data: {{path: {folder / 'texts.jsonl'}, id: id}}\n"
        "model: {layers: 1, heads: 2, width: 16, context: 32, vocabulary: 300}\n"
        "targets: {documents: 4}\n"
        "train: {epochs: 2, batch_size: 8}\n"
        "attribution: {rank: 4, ranks: {token.weight: 6}, curvature: ggn}\n",
        encoding="utf-8",
    )
    call("train", folder / "mine.yaml", "--embeddings")
    return folder / "run"


def call(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert not left.value.code


def test_training_keeps_the_curve_of_its_target_for_the_report(trained: Path) -> None:
    ledger = assay.open(trained)
    curve = ledger.table("influence")
    assert curve.columns == ["query", "step", "lr", "influence", "magnitude", "per_lr"]
    assert curve["query"].unique().to_list() == ["held_out"]
    assert curve.height == ledger.account()["step"].n_unique()
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "Influence by step over the learning rate" in page


def test_the_table_of_the_tokens_has_the_rank_that_was_named(trained: Path) -> None:
    from assay.embedding.recorded import Recorded

    header = Recorded(assay.open(trained)._source.gradients).header
    assert header.ranks["token.weight"] == 6
    assert set(header.ranks.values()) == {4, 6}


def test_weights_are_the_shares_of_the_tokens(trained: Path) -> None:
    """A row with more tokens counts for more in a mean over tokens."""
    from assay.embedding.recorded import Recorded

    recorded = Recorded(assay.open(trained)._source.gradients)
    for step in recorded.steps:
        own = recorded.weights[step.start : step.stop]
        torch.testing.assert_close(float(own.sum()), 1.0, rtol=1e-6, atol=0)
    assert recorded.weights.unique().numel() > 1


def test_a_text_finds_its_documents(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = assay.open(trained)
    first, second = ledger.metadata()["text"][:2]
    file = tmp_path / "query.txt"
    file.write_text(second, encoding="utf-8")
    out = tmp_path / "all.parquet"
    capsys.readouterr()
    call("influence", trained, "-q", first, "-q", file, "--segments", 2, "--curvature", "ggn", "--out", out)
    printed = capsys.readouterr().out
    found = influence_of_texts(ledger, {"first": first}, curvature="ggn")
    kept = pl.read_parquet(out)
    assert kept["query"].n_unique() == 2
    assert str(found.documents["id"][0]) in printed
    own = kept.filter(pl.col("query").str.starts_with("1: "))
    apart, size = (own["influence"] - found.documents["influence"]).abs().max(), own["influence"].abs().max()
    assert apart < 1e-4 * size  # type: ignore[operator]
    curve = assay.open(trained).table("influence")
    assert curve["query"].n_unique() == 2


def test_what_cannot_be_asked(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["influence", str(trained), "-q", ""])
    assert "too short" in capsys.readouterr().err
    config = load_config(trained.parent / "mine.yaml", {"out": tmp_path / "plain"})
    assert not config.attribution.embeddings
