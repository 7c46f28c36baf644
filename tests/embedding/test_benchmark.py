"""The page shows what the benchmark's committed results say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "embeddings.py"


def test_the_page_has_the_figures_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("embeddings_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.DOCS.read_text(encoding="utf-8") == module.page(), (
        "run python benchmarks/embeddings.py --docs"
    )
