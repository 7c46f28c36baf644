"""The benchmark runs, and writes what its table says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "overhead.py"


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("overhead", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "overhead.json"
    arguments = ["--size", "2x8x16x1", "--rounds", "2", "--warmup", "1", "--threads", "1", "--no-memory"]
    module.main([*arguments, "--out", str(out)])
    document = json.loads(out.read_text())
    assert set(document["machine"]) >= {"cpu", "cores", "threads", "torch"}
    rows = {(row["optimizer"], row["arm"]): row for row in document["rows"]}
    assert set(rows) == {(o, a) for o in ("sgd", "adamw") for a in ("plain", "pass", "assay")}
    for row in rows.values():
        assert (
            row["seconds"]["lower_quartile"] <= row["seconds"]["median"] <= row["seconds"]["upper_quartile"]
        )
        assert row["seconds"]["median"] > 0
    assert rows["sgd", "plain"]["ratio"]["median"] == 1.0
    assert rows["adamw", "pass"]["above_pass"]["median"] == 0.0
    printed = capsys.readouterr().out
    assert "2x8x16x1" in printed
    assert "adamw" in printed
