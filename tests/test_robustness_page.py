"""What the page on robustness says is what the committed results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "robustness.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("robustness", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: Any) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert text == script.page(text), "run python scripts/robustness.py"


def test_other_results_give_another_page(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    (tmp_path / "faults.json").write_text(
        '{"command": "c", "run": {"kills": 3, "acknowledged": 9, "ended the same": 2}, "index": {}, "embedding": {}, '
        '"record": {}}'
    )
    text = script.page(script.PAGE.read_text(encoding="utf-8"))
    assert "| a training run with in-run values | 3 | 9 | 0 | 2 |" in text
    assert "3 kills, 0 lost (`c`)." in text
