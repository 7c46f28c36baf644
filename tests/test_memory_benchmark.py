"""The benchmark of memory: its page says what its JSON says, and its parts measure what they say."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.beside import needs_data


@pytest.fixture
def memory(benchmark_of: Callable[[str], Any]) -> Any:
    return benchmark_of("memory")


def document(memory: Any) -> dict[str, Any]:
    """What a run writes, with figures that can be told apart."""
    rows = [
        {"arm": arm, "form": form, "checkpoints": on, "copies": 10 * a + f + on / 2}
        for a, arm in enumerate(memory.ARMS)
        for f, form in enumerate(memory.FORMS)
        for on in (False, True)
    ]
    return {
        "machine": {"gpu": None, "cpu": "a processor", "threads": 1, "torch": "2", "python": "3"},
        "peaks": {"size": memory.SIZE._asdict(), "weights_bytes": 5e7, "rows": rows},
        "errors": [
            {"run": "demo", "path": "left", "steps": 3, "rank_correlation": 0.9, "gap": 1e-5, "explained": 1.01}
        ],
        "truncated": [{"rank": 4, "error": 0.25, "share_of_memory": 0.1, "share_of_pass": 2.5}],
        "took_seconds": 7,
    }  # fmt: skip


def test_the_page_says_what_was_measured(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = importlib.import_module("memory_page")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert "Not measured" in page.section()
    (tmp_path / "memory-cpu.json").write_text(json.dumps(document(memory)))
    text = page.section()
    assert '| AdamW, `path="trapezoid"` | on | +20.50 | +21.50 | +22.50 | +23.50 |' in text
    assert '| demo, `path="left"`, 3 steps | 0.900000 | 1.0100 | 1.0e-05 |' in text
    assert "| 4 | 10 % | 25.00 % | 2.5 |" in text
    assert "moves nothing" in text


@pytest.mark.parametrize("kind", ["plain sgd", "sgd left", "adamw trapezoid"])
def test_an_arm_trains_as_the_plain_step_does(memory: Any, kind: str) -> None:
    device, size = torch.device("cpu"), memory.Size(2, 8, 16, 2)
    for checkpoints in (False, True):
        memory.arm(size, kind, "factors", checkpoints, device)()


def test_the_error_of_a_truncated_gradient_falls_with_its_rank(memory: Any) -> None:
    found = memory.truncated(Namespace(quick=True))
    assert [row["rank"] for row in found[:-1]] == list(memory.RANKS)
    assert 1e-5 < found[-1]["error"] < 0.01  # bfloat16, for comparison
    assert found[0]["error"] > found[1]["error"] > found[2]["error"]
    assert found[2]["error"] < 1e-5  # no matrix of that model has more


@needs_data
def test_digits_in_bfloat16_are_ranked_as_in_full(memory: Any) -> None:
    found = memory.mnist(Namespace(quick=True))
    assert [row["run"] for row in found] == ["MNIST, SGD 0.2", "MNIST, AdamW 5e-4"]
    for row in found:
        assert 0.99 < row["rank_correlation"] < 1
        assert 0 < row["gap"] < 0.01
