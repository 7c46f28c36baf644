"""Settings of experiments: read from YAML, checked, with smaller forms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

if TYPE_CHECKING:
    from experiments.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> type[Settings]:
    monkeypatch.syspath_prepend(str(ROOT))
    from experiments.settings import Settings

    class Own(Settings):
        steps: int

    return Own


def read(kind: type[Settings], tmp_path: Path, text: str, form: Any = "full") -> dict[str, Any]:
    from experiments.settings import read_settings

    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    return read_settings(kind, file, form).model_dump()


def test_a_form_takes_the_place_of_what_it_names(kind: type[Settings], tmp_path: Path) -> None:
    text = "seeds: [0, 1]\nsteps: 100\nquick: {seeds: [0]}\ntiny: {seeds: [0], steps: 2}\n"
    assert read(kind, tmp_path, text) == {"seeds": [0, 1], "steps": 100}
    assert read(kind, tmp_path, text, "quick") == {"seeds": [0], "steps": 100}
    assert read(kind, tmp_path, text, "tiny") == {"seeds": [0], "steps": 2}


@pytest.mark.parametrize(
    "text", ["seeds: [0]\n", "seeds: [0]\nsteps: many\n", "seeds: [0]\nsteps: 1\nstep: 2\n"]
)
def test_a_wrong_key_is_an_error(kind: type[Settings], tmp_path: Path, text: str) -> None:
    with pytest.raises(ValidationError):
        read(kind, tmp_path, text)


@pytest.mark.parametrize("form", ["full", "quick", "tiny"])
@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("mislabels", "MislabelSettings"),
        ("fidelity", "FidelitySettings"),
        ("effects", "EffectSettings"),
        ("pile", "PileSettings"),
        ("ladder", "LadderSettings"),
        ("cost", "CostSettings"),
    ],
)
def test_every_file_of_settings_is_understood(
    form: Any, module: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from importlib import import_module

    from experiments.settings import read_settings

    file = ROOT / "experiments" / "evidence" / f"{'curation' if module == 'pile' else module}.yaml"
    assert read_settings(getattr(import_module(f"experiments.evidence.{module}"), kind), file, form).seeds
