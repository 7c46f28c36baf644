"""The benchmark of the allocator: an arm in a process of its own, and the table of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def allocator(benchmark_of: Callable[[str], Any]) -> Any:
    return benchmark_of("allocator")


def test_an_arm_takes_its_steps_elsewhere(allocator: Any) -> None:
    arm = allocator.Apart(allocator.KEPT, allocator.QUICK, "sgd", "assay")
    for _ in range(3):
        arm()
    arm.end()
    assert len(arm.used) == 3
    assert arm.used[0][0] > arm.used[2][0] >= 0  # the first step faults its memory in
    assert arm._process.exitcode == 0


def test_the_table_says_what_was_measured(allocator: Any) -> None:
    spread = lambda x: {"median": x, "lower_quartile": x - 0.1, "upper_quartile": x + 0.1}  # noqa: E731
    rows = [
        {
            "size": allocator.SIZE._asdict(), "optimizer": "sgd", "allocator": name, "arm": arm,
            "seconds": spread(1.0), "ratio": spread(1.0 + a), "above_pass": spread(a - 1.0),
            "of_default": spread(0.5), "faults": 1000.0 * (a + 1) * (name == "default"), "system_seconds": 0.01 * a,
        }
        for name in allocator.ALLOCATORS
        for a, arm in enumerate(allocator.overhead.KINDS)
    ]  # fmt: skip
    machine = {"cpu": "a processor", "threads": 2, "torch": "2"}
    found = allocator.allocator_page.part({"machine": machine, "settings": {"rounds": 7}, "rows": rows})
    assert "each of 7 rounds" in found
    assert "| SGD: plain step | 1,000 | 0 | 1 |  | 0 | 1 |  | 0.50 (0.40 to 0.60) |" in found
    assert (
        '| SGD: `path="left"` | 3,000 | 20 | 3.00 (2.90 to 3.10) | +1.00 (+0.90 to +1.10) | 0 '
        "| 3.00 (2.90 to 3.10) | +1.00 (+0.90 to +1.10) | 0.50 (0.40 to 0.60) |"
    ) in found
