"""The page on scale says what the formulas say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_formulas() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "scale.py"))["page"]()
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == made, "run python scripts/scale.py"
