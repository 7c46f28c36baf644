"""What a run knows while it goes on, as flat numbers for a logger: explained share, value by group, time."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from assay.run import Run
from assay.store.parts import Mark
from assay.store.schema import value_column

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
        self._mark: Mark | None = None  # behind the last row that is in the sums
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
        rows, mark = self.run.writer.values_since(self._mark)
        group = pl.Series(map(groups.get, rows["id"].to_list()), dtype=pl.String).fill_null("(none)")
        for target in self.run.writer.ledger.targets:
            values = rows[value_column(target)].to_numpy()
            finite = np.isfinite(values)
            if finite.any():
                _add_up(self._sums[target], group.filter(pl.Series(finite)), values[finite])
        self._mark = mark


def _add_up(sums: dict[str, float], group: pl.Series, values: npt.NDArray[np.float64]) -> None:
    """Add values `[rows]` to the sums of their groups `[rows]`, one after the other: no bit depends on when we look."""
    names = group.unique(maintain_order=True)
    totals = np.array([sums[name] for name in names])
    np.add.at(totals, group.cast(pl.Enum(names)).to_physical().to_numpy(), values)
    sums.update(zip(names, totals.tolist(), strict=True))
