"""A run that is killed keeps every row whose flush had come back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from store import killed

from assay.errors import StoreError
from assay.store import RunWriter, open_ledger


def test_a_run_killed_at_any_point_of_any_write_keeps_what_was_flushed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, killed.__file__, str(tmp_path)], check=True, timeout=200)
    torn = finished = without_run = 0
    for folder in sorted(tmp_path.iterdir()):
        marks = (folder / "acknowledged").read_text()
        acknowledged = marks.count(".")
        torn += any(path.suffix == ".tmp" for path in folder.rglob("*"))
        finished += marks.endswith("!")
        if not (folder / "run" / "run.json").exists():
            without_run += 1
            assert not marks
            RunWriter(folder / "run", ["t"]).close()  # it begins where the killed one had not
            assert len(open_ledger(folder / "run").steps()) == 0
            continue
        ledger = open_ledger(
            folder / "run"
        )  # a missing part would be a warning, and warnings are errors here
        rows = ledger.steps().rows()
        flushed = len(rows) // 2
        expected = [
            row
            for step in range(flushed)
            for row in zip((step, step), ("a", f"only {step}"), killed.expected(step)[:, 0], strict=True)
        ]
        assert rows == expected
        # The kill may fall between the tables of one flush, so one of them may be a flush ahead.
        for length in (
            flushed,
            len(ledger.account()),
            len(ledger.metadata()),
            len(ledger.table("curve")) if ledger.tables else 0,
        ):
            assert acknowledged <= length <= acknowledged + 1
        with pytest.raises(StoreError, match="already holds a run"):
            RunWriter(folder / "run", ["t"])
    assert torn > 30  # the kills did fall into writes
    assert without_run >= 3
    assert finished == len(killed.POINTS)  # and each point was passed to the end of a run
