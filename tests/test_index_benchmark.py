"""The page on the index says what the benchmark's JSON says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """`benchmarks/index.py`."""
    spec = importlib.util.spec_from_file_location("index_benchmark", ROOT / "benchmarks" / "index.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_run_has_all_figures(benchmark: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "index.json"
    only = ["--only", "queries", "--only", "million"]
    benchmark.main(["--quick", "--rounds", "2", "--threads", "1", "--out", str(file), *only])
    document: dict[str, Any] = json.loads(file.read_text())
    assert [row["dtype"] for row in document["queries"]] == ["fp16", "bf16", "int8", "fp32"]
    page = f"# A page\n{benchmark.BEGIN}old\n{benchmark.END}behind\n"
    new = benchmark.with_figures(page, document)
    assert new.startswith("# A page\n")
    assert new.endswith("behind\n")
    assert "old" not in new
    assert f"{document['million']['pairs_per_second']['median']:,.0f} pairs/s" in new
    assert benchmark.with_figures(new, document) == new


def test_the_page_is_made_from_the_result(benchmark: ModuleType) -> None:
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.BEGIN in page
    assert benchmark.END in page
    file = benchmark.RESULTS / "index-cpu.json"
    if file.exists():
        assert benchmark.with_figures(page, json.loads(file.read_text())) == page, "run benchmarks/index.py"
