"""What assay adds to a training step, measured against the same step without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

__all__ = ["OverheadMeter", "now"]


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class OverheadMeter:
    """Compares a step of the run with a plain forward and backward pass over the same batch, now and then.

    The plain pass runs outside ``run.step``, half of the time before the step and half of the time after it;
    its gradients are thrown away and the random state is put back, so the run does not notice. Its time, plus
    what the optimizer's own update takes, is what the step would have cost. The overhead is the median over
    the comparisons of the one time over the other, less one: 0.2 stands for a run that takes a fifth longer.
    The time of the comparisons themselves is not in it.

    Args:
        model: what is trained.
        every: compare one step in so many; 0 for never.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self.model = model
        self.every = every
        self.ratios: list[float] = []
        self.seconds = 0.0
        self._plain: float | None = None

    @property
    def overhead(self) -> float | None:
        """Extra time as a fraction of a plain step; None before the first comparison."""
        return median(self.ratios) - 1 if self.ratios else None

    def due(self, step: int) -> bool:
        """Whether this step is compared: never one of the first two, which warm up."""
        return self.every > 0 and step % self.every == 2 % self.every and step >= 2

    def before(self, plain: Callable[[], None], device: torch.device) -> None:
        """Take the plain time before the step, every other time."""
        self._plain = self._time(plain, device) if len(self.ratios) % 2 == 0 else None

    def after(self, plain: Callable[[], None], device: torch.device, step: float, update: float) -> None:
        """Finish a comparison.

        Args:
            plain: runs forward and backward over the step's batches.
            device: where it runs.
            step: seconds of the whole step with assay on.
            update: seconds of its update that are not assay's: clipping, optimizer, schedule.
        """
        plain_time = self._plain if self._plain is not None else self._time(plain, device)
        self.ratios.append(step / (plain_time + update))

    def _time(self, plain: Callable[[], None], device: torch.device) -> float:
        states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if device.type == "cuda" else []
        start = now(device)
        plain()
        elapsed = now(device) - start
        self.model.zero_grad()
        torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])
        self.seconds += elapsed
        return elapsed
