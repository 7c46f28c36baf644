"""Intervals of a mean: by bootstrap over many queries, by Student's t over a few seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Score", "mean_with_interval", "over_seeds"]


@dataclass(frozen=True)
class Score:
    """A mean over queries.

    Args:
        mean: the mean.
        low: lower end of the bootstrap interval over the queries.
        high: its upper end.
        per_query: `[Q]`.
    """

    mean: float
    low: float
    high: float
    per_query: Tensor


def mean_with_interval(
    per_query: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Score:
    """The mean and its percentile interval (Efron and Tibshirani 1993, section 13.3).

    The difference of two methods on the same queries has a narrower interval than their means: hand over the
    differences.

    Args:
        per_query: `[Q]`.
        level: of the interval; (nan, nan) for a single query.
        resamples: of the queries.
        seed: of the resampling.

    Example:
        >>> import torch
        >>> found = mean_with_interval(torch.linspace(0, 1, 101))
        >>> round(found.mean, 2), found.low < 0.5 < found.high
        (0.5, True)
    """
    values = per_query.double().cpu()
    low = high = float("nan")
    if len(values) > 1:
        from scipy.stats import bootstrap

        low, high = bootstrap(
            (values.numpy(),), np.mean, confidence_level=level, n_resamples=resamples, method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return Score(float(values.mean()), float(low), float(high), per_query)


def over_seeds(values: Sequence[float] | Tensor, *, level: float = 0.95) -> Score:
    """The mean of a few repetitions and its interval by Student's t; a bootstrap of so few is too narrow.

    Args:
        values: one per seed.
        level: of the interval; (nan, nan) for a single seed.

    Example:
        >>> found = over_seeds([0.6, 0.7, 0.8])
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
        (0.7, 0.452, 0.948)
    """
    found = torch.as_tensor(values, dtype=torch.float64)
    mean, low, high = float(found.mean()), float("nan"), float("nan")
    if len(found) > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + level) / 2, len(found) - 1)) * float(found.std()) / len(found) ** 0.5
        low, high = mean - half, mean + half
    return Score(mean, low, high, found)
