"""The results page says what the JSON files say, all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_page_is_made_from_the_results() -> None:
    from experiments.page import PAGE, page, plots

    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m experiments.page"
    for file, drawing in plots().items():
        assert file.read_text(encoding="utf-8") == drawing, "run python -m experiments.page"


def test_every_result_is_on_the_page() -> None:
    from experiments.page import RESULTS, TOPICS

    shown = {name for topic in TOPICS for name in topic.SECTIONS}
    assert {path.stem for path in RESULTS.glob("*.json")} == shown
