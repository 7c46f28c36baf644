"""The examples run as they stand."""

from __future__ import annotations

import re
import runpy
import warnings
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


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("trainer", "datasets"),
        ("sft", "trl"),
        ("lightning_module", "lightning"),
        ("accelerate_loop", "accelerate"),
    ],
)
def test_each_trainer(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")  # those of the trainers' own libraries
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    ledger = names["run"].ledger if "run" in names else names["callback"].ledger
    target = ledger.targets[-1]
    assert ledger.account(target)["actual"].sum() > 0.05
    assert ledger.explained(target) == pytest.approx(1, abs=0.2)
    known = pl.read_parquet(CORPUS)
    seen = ledger.metadata().join(known, on="id", how="left", suffix="_known")
    assert (seen["domain"] == seen["domain_known"]).all()
    assert set(ledger.values(target)["id"]) <= set(known["id"])


def test_three_lines_are_marked_in_each() -> None:
    for name in ("trainer", "sft", "lightning_module", "accelerate_loop"):
        lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert [line[-3:] for line in lines if re.search(r"# \d$", line)] == ["# 1", "# 2", "# 3"]
