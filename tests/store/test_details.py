"""Tables that not every run has: values by token and norms of gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

import assay
from assay.store import RunWriter


def rows(step: int, tokens: list[list[float]], rest: list[float]) -> dict[str, Any]:
    return {
        "step": [step] * len(rest),
        "micro": [0] * len(rest),
        "tokens:code": pl.Series(tokens, dtype=pl.List(pl.Float32)),
        "rest:code": rest,
    }


def recorded(out: Path | None) -> assay.Ledger:
    writer = RunWriter(out, targets=["code"])
    writer.add_rows("tokens", [7, 8], rows(0, [[0.5, 0.25], [1.0]], [0.125, 0.0]))
    writer.flush()
    writer.add_rows("tokens", [7], rows(1, [[1.0, 2.0, 4.0]], [8.0]))
    writer.add_rows("norms", [7], {"step": [0], "micro": [0], "norm": [2.0], "cosine": [None]})
    writer.close()
    return writer.ledger if out is None else assay.open(out)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_tokens_and_norms_are_read_back(where: str, tmp_path: Path) -> None:
    ledger = recorded(tmp_path / "run" if where == "disk" else None)
    assert ledger.tokens("code").rows() == [
        (7, 0, 1.5, 2), (7, 1, 2.25, 2), (7, 2, 4.0, 1), (7, None, 8.125, 2), (8, 0, 1.0, 1), (8, None, 0.0, 1),
    ]  # fmt: skip
    assert ledger.tokens(id=7, step=0)["value"].to_list() == [0.5, 0.25, 0.125]
    assert ledger.norms().columns == ["step", "id", "norm", "cosine"]
    ledger.verify()


def test_a_damaged_part_of_the_tokens_is_found(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    part = sorted((tmp_path / "run" / "tokens").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-9] + b"123456789")
    with pytest.raises(assay.StoreError, match=part.name):
        assay.open(tmp_path / "run")


def test_a_run_without_them_says_how_to_get_them() -> None:
    ledger = RunWriter(None, targets=["code"]).ledger
    with pytest.raises(assay.InputError, match=r"no tokens.*granularity='token'"):
        ledger.tokens()
    with pytest.raises(assay.InputError, match=r"no norms.*assay.GradientNorms"):
        ledger.norms()
