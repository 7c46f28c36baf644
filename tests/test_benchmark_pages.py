"""Pages of the documentation say what the benchmarks' JSON says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(script: str) -> ModuleType:
    """A benchmark under a name that no package of the tests has."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{script}", BENCHMARKS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = {
    "index": "influence", "adjoint": "adjoint", "recording": "embeddings", "embeddings": "embeddings",
    "contractions": "decisions/0019-form-large-gradients-one-by-one",
}  # fmt: skip


@pytest.mark.parametrize(("script", "name"), PAGES.items())
def test_a_page_is_made_from_the_results(script: str, name: str) -> None:
    benchmark, pages = load(script), load("pages")
    page = pages.page_of(name).read_text(encoding="utf-8")
    document = json.loads((BENCHMARKS / "results" / f"{script}-cpu.json").read_text(encoding="utf-8"))
    assert pages.with_figures(page, script, benchmark.figures(document)) == page, (
        f"run benchmarks/{script}.py"
    )


def test_old_figures_are_replaced() -> None:
    pages = load("pages")
    page = "# A page\n<!-- figures of benchmarks/some.py -->\nold\n<!-- end of the figures -->\nbehind\n"
    new = pages.with_figures(page, "some", "new\n")
    assert new == page.replace("old\n", "\nnew\n\n")
    assert pages.with_figures(new, "some", "new\n") == new
    with pytest.raises(ValueError, match="lacks the marks"):
        pages.with_figures(page, "other", "new\n")


def test_results_go_to_their_file_and_to_the_page_that_is_made_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = load("pages")
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    page, text = tmp_path / "some.md", "<!-- figures of benchmarks/a.py -->\n<!-- end of the figures -->\n"
    page.write_text(text, encoding="utf-8")

    def keep(out: Path | None, number: int) -> None:
        pages.keep({"number": number}, out, "a", "some", lambda document: f"{document['number']}\n")

    keep(None, 1)
    keep(tmp_path / "elsewhere" / "a-cpu.json", 2)
    assert json.loads((tmp_path / "elsewhere" / "a-cpu.json").read_text(encoding="utf-8")) == {"number": 2}
    assert page.read_text(encoding="utf-8") == text
    keep(tmp_path / "results" / "a-cpu.json", 3)
    assert json.loads((tmp_path / "results" / "a-cpu.json").read_text(encoding="utf-8")) == {"number": 3}
    assert page.read_text(encoding="utf-8") == text.replace("<!-- end", "\n3\n\n<!-- end")


def test_a_process_of_its_own_gives_the_numbers_of_its_last_line(tmp_path: Path) -> None:
    overhead, script = load("overhead"), tmp_path / "script.py"
    script.write_text(
        "import os, sys\nprint('first')\nprint(sys.argv[1], os.environ['B'])\nsys.exit(int(sys.argv[2]))\n",
        encoding="utf-8",
    )
    assert overhead.in_own_process(str(script), 3, 0, environment={"B": "4"}) == [3, 4]
    with pytest.raises(SystemExit, match=r"script.py 3 5 ended with status 5"):
        overhead.in_own_process(str(script), 3, 5, environment={"B": "4"})


def test_a_small_run_of_the_index_has_all_figures(tmp_path: Path) -> None:
    index: Any = load("index")
    file = tmp_path / "index.json"
    only = ["--only", "queries", "--only", "million"]
    index.main(["--quick", "--rounds", "2", "--threads", "1", "--out", str(file), *only])
    document: dict[str, Any] = json.loads(file.read_text())
    assert [row["dtype"] for row in document["queries"]] == ["fp16", "bf16", "int8", "fp32"]
    assert f"{document['million']['pairs_per_second']['median']:,.0f} pairs/s" in index.figures(document)
