"""The examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import polars as pl
import pytest

from assay.demo import CORPUS
from assay.train import load_config, train

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "loop.py"))
    ledger = names["run"].ledger
    assert set(ledger.values("bible")["id"]) == set(names["documents"]["id"])
    for target in ("bible", "python_code"):
        assert ledger.account(target)["actual"].sum() > 0.5
        assert ledger.explained(target) == pytest.approx(1, abs=0.2)
    assert "python_code: " in capsys.readouterr().out


def test_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for row in pl.read_parquet(CORPUS).head(60).to_dicts():
        if row["domain"] in ("bible", "novels", "speeches"):
            file = tmp_path / "texts" / row["domain"] / (row["id"].replace("/", "-") + ".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(row["text"][:100], encoding="utf-8")
    small = {"targets.documents": 1, "model.layers": 1, "model.width": 16, "model.heads": 2, "train.steps": 2}
    result = train(load_config(EXAMPLES / "texts.yaml", small))
    assert result.targets == ["bible", "novels", "speeches"]
    assert result.out == Path("runs/texts")
    assert result.ledger.by("folder", "bible")["samples"].sum() == result.documents.height
