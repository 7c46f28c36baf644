"""What a run knows while it goes on, as flat numbers for a logger: explained share, value by group, time."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from assay.run import Run

__all__ = ["LiveValues"]

GROUPS = 12
"""Groups logged for each target, those that weigh most; a logger draws a curve for each."""


class LiveValues:
    """Running sums of a run's values by group.

    Args:
        run: the run that is watched.

    Example:
        >>> import assay, torch
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def loss_fn(model, x):
        ...     return model(x).square().mean()
        >>> target = assay.Target([torch.ones(1, 1)], loss_fn)
        >>> run = assay.Run(model, optimizer, methods=[assay.InRunShapley({"small": target})])
        >>> live = LiveValues(run)
        >>> for _ in range(2):
        ...     with run.step(["a"]):
        ...         loss_fn(model, torch.ones(1, 1)).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sorted(live.read({"a": "law"}))
        ['assay/explained/small', 'assay/share_of_time', 'assay/value/small/law']
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.started = time.perf_counter()
        self._read = -1  # the last step whose values are in the sums
        self._sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def read(self, groups: Mapping[Any, str] | None = None) -> dict[str, float]:
        """The numbers as they stand; only what is new is read.

        Args:
            groups: the group of each id; without it no values are given.

        Returns:
            `assay/explained/TARGET` (share of the loss drop so far), `assay/value/TARGET/GROUP` (sum since the start,
            in the target's unit) and `assay/share_of_time`: the part of the time since the start that assay spent on
            the targets' passes, contractions and booking. What the capture adds inside the forward and backward pass
            is not in it.
        """
        status = self.run.status()
        numbers = {f"assay/explained/{name}": share for name, share in status.explained.items()}
        numbers["assay/share_of_time"] = status.seconds / max(time.perf_counter() - self.started, 1e-9)
        if groups is not None:
            self._add(groups)
            for target, sums in self._sums.items():
                heaviest = sorted(sums, key=lambda group: -abs(sums[group]))[:GROUPS]
                numbers |= {f"assay/value/{target}/{group}": sums[group] for group in heaviest}
        return {name: number for name, number in numbers.items() if math.isfinite(number)}

    def _add(self, groups: Mapping[Any, str]) -> None:
        ledger, last = self.run.ledger, self._read
        for target in ledger.targets:
            for step, id_, value in ledger.steps(target, first=self._read + 1).iter_rows():
                if math.isfinite(value):
                    self._sums[target][groups.get(id_, "(none)")] += value
                last = max(last, step)
        self._read = last
