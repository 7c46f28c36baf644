"""Pages of the documentation say what the benchmarks' JSON says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(("script", "name"), [
        ("index", "influence"), ("adjoint", "adjoint"), ("recording", "embeddings"), ("embeddings", "embeddings"),
    ],
)  # fmt: skip
def test_a_page_is_made_from_the_results(script: str, name: str) -> None:
    benchmark, pages = importlib.import_module(script), importlib.import_module("pages")
    page = pages.page_of(name).read_text(encoding="utf-8")
    document = json.loads((BENCHMARKS / "results" / f"{script}-cpu.json").read_text(encoding="utf-8"))
    assert pages.with_figures(page, script, benchmark.figures(document)) == page, (
        f"run benchmarks/{script}.py"
    )


def test_old_figures_are_replaced() -> None:
    pages = importlib.import_module("pages")
    page = "# A page\n<!-- figures of benchmarks/some.py -->\nold\n<!-- end of the figures -->\nbehind\n"
    new = pages.with_figures(page, "some", "new\n")
    assert new == page.replace("old\n", "\nnew\n\n")
    assert pages.with_figures(new, "some", "new\n") == new
    with pytest.raises(ValueError, match="lacks the marks"):
        pages.with_figures(page, "other", "new\n")


def test_a_small_run_of_the_index_has_all_figures(tmp_path: Path) -> None:
    index: Any = importlib.import_module("index")
    file = tmp_path / "index.json"
    only = ["--only", "queries", "--only", "million"]
    index.main(["--quick", "--rounds", "2", "--threads", "1", "--out", str(file), *only])
    document: dict[str, Any] = json.loads(file.read_text())
    assert [row["dtype"] for row in document["queries"]] == ["fp16", "bf16", "int8", "fp32"]
    assert f"{document['million']['pairs_per_second']['median']:,.0f} pairs/s" in index.figures(document)
