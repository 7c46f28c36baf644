"""Values and accounts of two processes are those of one with the whole batch."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from distributed.cases import CASES, train

import assay


@pytest.mark.parametrize("name", CASES)
def test_two_processes_value_as_one_does(name: str, trained: Path, tmp_path: Path) -> None:
    case = CASES[name]
    tolerance = 1e-9 if case.dtype == torch.float64 else 1e-5
    alone, weights = train(case, tmp_path / name, rank=0, size=1)
    ledger = assay.open(trained / name)
    ledger.verify()
    for key, weight in torch.load(trained / f"{name}.weights").items():
        torch.testing.assert_close(weight, weights[key], rtol=tolerance, atol=tolerance)
    for target in alone.ledger.targets:
        own, other = (
            found.steps(target).group_by("step", "id").agg(pl.col("value").sum()).sort("step", "id")
            for found in (alone.ledger, ledger)
        )
        assert own.select("step", "id").equals(other.select("step", "id"))
        scale = float(own["value"].abs().max())
        assert scale > 0
        assert float((own["value"] - other["value"]).abs().max()) <= tolerance * scale
        own, other = (found.account(target) for found in (alone.ledger, ledger))
        assert own["step"].to_list() == other["step"].to_list()
        for line in ("predicted", "carried", "decayed", "actual", "residual"):
            scale = float(
                own.select(pl.col("predicted", "carried", "actual").abs().max()).max_horizontal()[0]
            )
            assert float((own[line] - other[line]).abs().max()) <= tolerance * max(scale, 1e-3), line
        assert own["status"].to_list() == other["status"].to_list()
