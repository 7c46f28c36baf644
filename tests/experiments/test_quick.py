"""Every experiment of the evidence in its quick form: it runs, goes on, says what can be, and becomes a section."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from math import isfinite, log
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.beside import needs_data

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, needs_data]

Result = dict[str, Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs an experiment as its command does, and again, when all is there; its result, with its section."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()

    def run(module: str, kind: str, name: str | None = None) -> Result:
        from experiments.command import run_seeds_as_command
        from experiments.evidence.page import SECTIONS

        name, found = name or module, import_module(f"experiments.evidence.{module}")
        settings = (getattr(found, kind), found.SETTINGS)
        monkeypatch.setattr("sys.argv", [module, "--quick", "--cache", str(tmp_path)])
        results = []
        for _ in range(2):
            run_seeds_as_command(name, f"evidence.{module}", settings, found.one, found.summary)
            results.append(json.loads((tmp_path / "quick" / f"{name}.json").read_text(encoding="utf-8")))
        assert results[0] == results[1]
        assert results[0]["seeds"] == [0]
        assert results[0]["command"] == f"python -m experiments.evidence.{module}"
        assert all(isfinite(x) for x in numbers(results[0]))
        section = SECTIONS[name](results[0])
        assert section.startswith("## ")
        assert "1 seed." in section
        return results[0]

    yield run
    torch.set_num_threads(threads)


def numbers(of: Any) -> Iterator[float]:
    """Every number in a result."""
    if isinstance(of, dict):
        of = list(of.values())
    if isinstance(of, list):
        for each in of:
            yield from numbers(each)
    elif isinstance(of, float):
        yield of


def test_flipped_labels(run: Callable[..., Result]) -> None:
    found = run("mislabels", "MislabelSettings")["tables"]["MNIST"]
    rows = {row["method"]: row for row in found["rows"]}
    assert len(rows) == 20
    assert rows["low loss"]["auroc"]["mean"] > 0.8
    assert rows["low loss"]["auroc"]["mean"] > rows["random"]["auroc"]["mean"] + 0.2
    for row in rows.values():
        assert 0 <= row["auroc"]["mean"] <= 1
        assert all(0.05 < share["mean"] < 1 for share in row["accuracy"])


def test_fidelity(run: Callable[..., Result]) -> None:
    found = run("fidelity", "FidelitySettings", "fidelity_seeds")
    off = {row["path"]: row["rmse"]["mean"] for row in found["steps"]}
    assert len(off) == 4
    assert max(off["hessian"], off["trapezoid"], off["simpson"]) < off["left"]
    correlations = {name: row["mean"] for name, row in found["runs"]["SGD 0.05"].items()}
    assert len(correlations) == 5
    assert 1 >= correlations["embeddings, ggn"] > correlations["dot product"] >= -1


def test_groups_and_best_examples_left_out(run: Callable[..., Result]) -> None:
    found = run("effects", "EffectSettings")["tables"]
    digits, text = ({row["method"]: row for row in found[model]} for model in ("MNIST-MLP", "tiny GPT"))
    assert set(digits) >= {"random", "in-run, trapezoid", "adjoint, hessian", "EKFAC", "TRAK"}
    assert set(text) >= {"random", "in-run, trapezoid", "adjoint, hessian", "EKFAC", "BM25"}
    for row in (*digits.values(), *text.values()):
        assert -1 <= row["lds"]["mean"] <= 1
    assert digits["adjoint, hessian"]["rise"][0]["mean"] > digits["random"]["rise"][0]["mean"]


def test_curation_and_the_composition_of_its_runs(run: Callable[..., Result]) -> None:
    from experiments.evidence.composition import PANELS
    from experiments.evidence.page import PLOTS

    found = run("curation", "PileSettings")
    arms = {row["arm"]: row for row in found["table"]}
    assert {"all", "negative", "random", "same mixture", "top loss"} <= set(arms)
    vocabulary = found["settings"]["vocabulary"]
    assert all(1 < row["loss"]["mean"] < log(vocabulary) for row in arms.values())
    assert 0 < found["negative"]["mean"] < 0.5
    assert 0.9 < found["explained"]["mean"] < 1.1

    found = run("composition", "PileSettings")
    for target in PANELS:
        shares = [row["share"] for row in found["composition"] if row["target"] == target]
        assert len(shares) == 13
        assert [sum(window) for window in zip(*shares, strict=True)] == pytest.approx(
            [1] * found["settings"]["windows"], abs=1e-4
        )
    name, draw = PLOTS["results-composition.svg"]
    assert name == "composition"
    assert draw(found).count("<polyline") == len(PANELS) * 13


def test_the_paraphrase_ladder(run: Callable[..., Result]) -> None:
    found = run("ladder", "LadderSettings")
    rows = {(row["method"], row["rung"]): row for row in found["table"]}
    assert len(rows) == 15 * 4
    assert rows["BM25", "verbatim"]["rank"]["mean"] == 1
    assert rows["sentence similarity", "verbatim"]["rank"]["mean"] == 1
    for row in rows.values():
        assert 1 <= row["rank"]["mean"] <= found["documents"]
        assert row["recall1"]["mean"] <= row["recall10"]["mean"]


def test_cost(run: Callable[..., Result]) -> None:
    found = run("cost", "CostSettings")
    rows = {row["method"]: row for row in found["table"]}
    assert list(rows) == found["settings"]["methods"]
    assert {name for name, row in rows.items() if row["watches"]} == {"in-run, left, one target"}
    for row in rows.values():
        assert row["plain"] > 0
        assert row["memory"] >= 0
        assert row["seconds"] < row["process"]
        one = row["one_of_queries"]
        assert one["low"] <= one["seconds"] <= one["high"]
