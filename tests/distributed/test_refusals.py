"""What cannot be followed in two processes is refused in one line, by both; and trainings that change their number."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import elastic, refusals


@pytest.mark.parametrize("name", [*refusals.NAMES, *elastic.NAMES])
def test_both_processes_come_to_their_end(name: str, trained: Path) -> None:
    assert (trained / f"{name}.done-0").exists(), "process 0 did not come to its end"
    assert (trained / f"{name}.done-1").exists(), "process 1 did not come to its end"
