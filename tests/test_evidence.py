"""The evidence on truths runs from end to end in its smallest form, and its sections can be written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "mnist10k.npz"


@pytest.mark.skipif(not DATA.is_file(), reason="the data of the experiments is not beside this checkout")
@pytest.mark.parametrize(
    ("module", "name"), [("mislabels", "mislabels"), ("fidelity", "fidelity_seeds"), ("effects", "effects")]
)
def test_the_smallest_form_becomes_a_section(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy

    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(
        sys, "argv", [module, "--tiny", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    )
    runpy.run_module(f"experiments.evidence.{module}", run_name="__main__")
    from experiments.evidence.truth_page import SECTIONS

    found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    text = SECTIONS[name](found)
    assert found["command"] == f"python -m experiments.evidence.{module}"
    assert text.startswith("## ")
    assert "1 seed" in text
    assert "| method |" in text or "| learning rate |" in text
