"""The results page says what the JSON files say, and its first table can be had again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_page_is_made_from_the_results() -> None:
    from experiments.page import PAGE, PLOT, page

    text, drawing = page()
    assert PAGE.read_text(encoding="utf-8") == text, "run python -m experiments.page"
    assert PLOT.read_text(encoding="utf-8") == drawing, "run python -m experiments.page"


def test_every_result_is_on_the_page() -> None:
    from experiments.page import RESULTS, SECTIONS

    kept = [json.loads(path.read_text())["command"] for path in RESULTS.glob("*.json")]
    shown = [f"python -m experiments.paths.{name}" for name in SECTIONS]
    assert {c for c in kept if c.startswith("python -m experiments.paths.")} == set(shown)


@pytest.mark.parametrize(("kind", "lr"), [("SGD", 0.1), ("AdamW", 0.008)])
def test_brute_force_again(kind: str, lr: float) -> None:
    """One seed of the first table: the quadratures are at least as near to the truth as the Hessian."""
    from experiments.paths.brute_force import one

    truth, found, explained = one(kind, lr, seed=0)
    error = {path: float((values - truth).abs().max()) for path, values in found.items()}
    assert error["simpson"] <= error["trapezoid"] <= error["hessian"] < 0.1 * error["left"]
    assert abs(1 - explained["simpson"]) < 1e-5
