"""The arms of a benchmark in one process: each once per round, in an order drawn anew for every round.

What else the machine does hits all arms alike, and a ratio is taken within a round. The order is drawn because what ran
before leaves its mark: it empties the caches, and decides whether memory is at hand or comes in fresh pages. Where an
order merely rotates, each arm follows the same one in every round, and pays for that one alone.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

__all__ = ["Arm", "Step", "in_rounds", "seconds", "summary", "synchronize"]

Step = Callable[[], object]
Arm = TypeVar("Arm", bound=Hashable)


def in_rounds(
    arms: Mapping[Arm, Step],
    rounds: float,
    *,
    warmup: int = 0,
    least: int = 0,
    limit: float = math.inf,
    device: torch.device | None = None,
) -> dict[Arm, list[float]]:
    """Seconds of each arm by round.

    Args:
        arms: what is timed, by name.
        rounds: of all arms.
        warmup: rounds before these, which are not in the answer.
        least: rounds that are taken whatever `limit` says.
        limit: seconds after which no further round begins.
        device: to wait for before and after each.
    """
    drawn, order = random.Random(0), list(arms)
    taken: dict[Arm, list[float]] = {name: [] for name in order}
    for _ in range(warmup):
        for name in order:
            arms[name]()
    began, number = time.perf_counter(), 0
    while number < least or (number < rounds and time.perf_counter() - began < limit):
        for name in drawn.sample(order, len(order)):
            taken[name].append(seconds(arms[name], device))
        number += 1
    return taken


def seconds(step: Step, device: torch.device | None = None) -> float:
    """Wall-clock time of a step, the device idle before and after."""
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device | None) -> None:
    """Wait until the device has done all it was given."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}
