"""The coverage page says what the committed results say, and nothing in them is wrong."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import coverage_page

    return coverage_page


def test_the_page_is_made_from_the_results(written: ModuleType) -> None:
    page = written.PAGE.read_text(encoding="utf-8")
    assert page == written.page(written.RESULTS), "run python scripts/coverage_page.py"


def test_no_family_is_wrong_and_every_other_has_its_reason(written: ModuleType) -> None:
    made, results = written.read(written.RESULTS)
    assert len(results) <= made["model_types"]
    for family, row in results.items():
        if row["kind"] in ("fast path", "fallback"):
            assert row["error"] < written.ROUNDING[1], family
            assert row["ways"], family
        else:
            assert row["kind"] in ("refused", "not tiny", "not built"), family
            assert row["why"], family
