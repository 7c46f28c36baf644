"""The first table of the results page can be had again."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize(("kind", "lr"), [("SGD", 0.1), ("AdamW", 0.008)])
def test_brute_force_again(kind: str, lr: float) -> None:
    """One seed of the first table: the quadratures are at least as near to the truth as the Hessian."""
    from experiments.paths.brute_force import one

    truth, found, explained = one(kind, lr, seed=0)
    error = {path: float((values - truth).abs().max()) for path, values in found.items()}
    assert error["simpson"] <= error["trapezoid"] <= error["hessian"] < 0.1 * error["left"]
    assert abs(1 - explained["simpson"]) < 1e-5
