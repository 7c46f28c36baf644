"""A short campaign of kills; `python tests/faults/campaign.py` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from faults import campaign

KILLS = 8


def test_whatever_is_killed_ends_the_same(tmp_path: Path) -> None:
    """In a process of its own: it forks, and this one has threads."""
    out = tmp_path / "faults.json"
    command = [sys.executable, campaign.__file__, "--kills", str(KILLS), "--lives", "2", "--out", str(out)]
    subprocess.run(command, check=True, timeout=280)
    found = json.loads(out.read_text())
    kinds = {"run", "index", "embedding", "record"}
    assert set(found) == {"command", *kinds}
    assert sum(found[kind].get("lost", 0) for kind in kinds) == 0
    assert sum(found[kind].get("kills", 0) for kind in kinds) >= KILLS
    assert found["run"]["ended the same"] >= 1
