"""Fingerprints tell functions, models and data apart, and are the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from assay.evaluate.fingerprint import called, fingerprint

SCRIPT = """
from functools import cache, partial
import torch
from torch import nn
from assay.evaluate.fingerprint import called, fingerprint

WORDS, SCALE = {"red", "green", "blue", "grey"}, 2.0

def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)

@torch.no_grad()
def losses(model, rows):
    return SCALE * criterion(model(rows)) * even(len(WORDS)) * (rows in {"a", "b", "c"})

@cache
def make_model(): return nn.TransformerEncoderLayer(8, 2)

class Both:
    def __init__(self): self.function, self.own = losses, self
    def __call__(self, model, rows): return self.function(model, rows)

criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
found = [losses, partial(losses, rows=WORDS), make_model, Both(), Both().__call__, lambda x: losses(x, object())]
before = [called(f) for f in found]
torch.manual_seed(0)
make_model()
assert [called(f) for f in found] == before
print(before, fingerprint(make_model(), WORDS, {"x": torch.ones(2, dtype=torch.bfloat16)}))
"""


def test_other_processes_find_the_same(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    found = set()
    for seed, above in (("1", ""), ("2", "# further down\n\n")):
        file.write_text(above + SCRIPT)
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found.add(subprocess.check_output([sys.executable, str(file)], env=environment, text=True))
    assert len(found) == 1, found
    assert "partial(__main__.losses)" in found.pop()


def scaled(x: Any, by: float = 1.0) -> Any:
    return x * by


def by_two(x: Any) -> Any:
    return scaled(x) * 2


def closure(by: Any) -> Callable[[Any], Any]:
    return lambda x: x * by


@dataclass
class Numbers:
    first: float
    second: Any = None


class Scaled:
    def __init__(self, by: Any) -> None:
        self.by = by

    def __call__(self, x: Any) -> Any:
        return x * self.by

    def method(self, x: Any) -> Any:
        return x


class Net(nn.Module):
    def __init__(self, scale: float = 1.0, names: tuple[str, str] = ("a", "b")) -> None:
        super().__init__()
        self.scale = scale
        for name in names:
            self.register_buffer(name, torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def linear(bias: float) -> nn.Module:
    model = nn.Linear(2, 2)
    for p in model.parameters():
        nn.init.constant_(p, bias)
    return model


APART: dict[str, list[Any]] = {
    "numbers": [1, 1.0, True, "1", b"1", None, [1], (1,), {1}, {1: 1}, np.float32(1), range(1)],
    "tensors": [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3).double(), torch.ones(2, 3), torch.tensor(0.0)],
    "arrays": [np.zeros(2), np.zeros((1, 2)), np.zeros(2, np.float32), np.ones(2), np.array([None])],
    "functions": [scaled, by_two, torch.sin, torch.cos, np.sin, len, lambda x: x + 1, lambda x: x + 2],
    "partials": [partial(scaled, by=1), partial(scaled, by=2), partial(scaled, 1), partial(by_two)],
    "closures": [closure(2), closure(3), closure(torch.ones(2)), closure(torch.zeros(2)), closure(scaled)],
    "objects": [Scaled(2), Scaled(3), Scaled(scaled), Scaled(by_two), Scaled(2).method, Scaled(2).__call__],
    "dataclasses": [Numbers(1), Numbers(2), Numbers(1, scaled), Numbers(1, by_two)],
    "modules": [
        linear(0), linear(1), nn.Linear(3, 2), nn.Dropout(0.1), nn.Dropout(0.2), nn.Dropout(0.2).eval(), Net(), Net(2),
        Net(names=("a", "c")), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.Sequential(nn.ReLU(), nn.Dropout()), nn.Sequential(nn.Dropout(), nn.ReLU()),
    ],
    "wrappers": [cache(scaled), cache(by_two), torch.no_grad()(scaled), torch.no_grad()(by_two)],
    "containers": [{"x": 1, "y": 2}, {"x": 2, "y": 1}, [1, [2]], [[1], 2], [1, 2]],
}  # fmt: skip


@pytest.mark.parametrize("kind", APART)
def test_what_differs_is_told_apart(kind: str) -> None:
    found = [fingerprint(value) for value in APART[kind]]
    assert len(set(found)) == len(found)
    assert found == [fingerprint(value) for value in APART[kind]]


def test_what_is_the_same_is_not() -> None:
    assert fingerprint(closure(2)) == fingerprint(closure(2))
    assert fingerprint(Scaled(torch.ones(2))) == fingerprint(Scaled(torch.ones(2)))
    assert fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1})
    assert fingerprint(linear(0.5), torch.ones(4)[::2]) == fingerprint(linear(0.5), torch.ones(2))


def test_globals_that_a_function_reads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = called(by_two)
    monkeypatch.setitem(globals(), "scaled", closure(2))
    assert called(by_two) != before
    assert called(by_two).split()[0] == f"{__name__}.by_two"
