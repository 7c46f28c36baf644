"""The table of the methods beside the exact adjoint, and what it advises."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from assay.report import write
from assay.report.tables import trusted
from assay.store import RunWriter


def frame(**by_id: list[float]) -> pl.DataFrame:
    rows = [(m, f"t{i}", None, value) for m, values in by_id.items() for i, value in enumerate(values)]
    return pl.DataFrame(rows, schema=["method", "query", "by_step", "by_id"], orient="row")


@pytest.mark.parametrize(
    ("table", "advice"),
    [
        (frame(one=[0.99, 0.4], other=[0.93, 0.95]), "(correlation 0.93): “other” rank the documents almost"),
        (frame(one=[0.6, 0.7]), "(correlation 0.60): “one” come nearest"),
        (
            frame(one=[0.1], other=[-0.9]),
            "(correlation 0.10): no cheaper method is near (the best are “one”)",
        ),
        (frame(one=[float("nan")], other=[0.95]), "“other” rank"),
    ],
)
def test_the_advice_follows_the_worst_target(table: pl.DataFrame, advice: str) -> None:
    assert advice in trusted(table, "document")


def test_there_is_none_without_a_number() -> None:
    assert trusted(None, "document") == ""
    assert trusted(frame(one=[float("nan")]), "document") == ""


def test_the_section_is_there_with_the_table_and_only_then(tmp_path) -> None:
    def page(table: pl.DataFrame | None) -> str:
        writer = RunWriter(None, targets=["code"])
        writer.add_values(0, 0, ["a", "b"], np.array([[0.5], [-0.25]]))
        if table is not None:
            writer.add_table("agreement", table)
        writer.close()
        return write(writer.ledger, tmp_path / "page.html").read_text(encoding="utf-8")

    text = page(frame(embeddings=[0.87]))
    assert '<section id="trust">' in text
    assert '<a href="#trust">' in text
    assert ">0.87</td>" in text
    assert "–</td>" in text  # no value by step
    assert 'id="trust"' not in page(None)
