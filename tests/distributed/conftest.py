"""All cases are trained once, by two processes that start once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from distributed import worker


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes left of every case."""
    folder = tmp_path_factory.mktemp("distributed")
    done = subprocess.run(
        [sys.executable, worker.__file__, str(folder)], capture_output=True, text=True, timeout=280
    )
    errors = [f"{path.name}:\n{path.read_text()}" for path in folder.glob("*.error-*")]
    assert done.returncode == 0, "\n".join([*errors, done.stderr[-3000:]])
    return folder
