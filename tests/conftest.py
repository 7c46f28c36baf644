"""What every test starts from: fixed seeds, one torch thread, repeatable hypothesis examples."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=30, database=None)
settings.load_profile("ci")

torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator, so that a test gives the same numbers alone and within the whole suite."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def benchmark_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script of `benchmarks/` by its name; they import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module
