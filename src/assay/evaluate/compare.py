"""Methods side by side on one truth: who is better than chance, and which is the cheapest of the good ones?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.errors import InputError
from assay.evaluate.baselines.base import Scores
from assay.evaluate.subsets import SubsetTruth

__all__ = ["Compared", "compare", "recommended"]

Draws = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """A method's linear datamodeling score.

    Args:
        name: of the method.
        lds: mean over the questions.
        low: lower end of its interval.
        high: upper end.
        seconds: what the scores took.
        behind: whether it is shown to be worse than the best: the interval of the difference lies above 0.
    """

    name: str
    lds: float
    low: float
    high: float
    seconds: float
    behind: bool

    @property
    def better_than_chance(self) -> bool:
        """Whether the interval lies above 0, which is what random scores have on average."""
        return self.low > 0


def compare(
    scores: Sequence[Scores], truth: SubsetTruth, *, level: float = 0.95, resamples: int = 500, seed: int = 0
) -> list[Compared]:
    """Linear datamodeling scores with bootstrap intervals over the subsets, the best method first.

    Few questions are asked of one's own data, so that the retrainings are resampled and not the questions: the interval
    says how sure these retrainings are of the score. Differences are taken on the same resampled subsets.

    Args:
        scores: of each method.
        truth: losses of the questions after training on each subset.
        level: of the intervals.
        resamples: of the subsets.
        seed: of the resampling.

    Raises:
        InputError: fewer than 5 subsets, of which nothing can be said, or two methods of one name.

    Example:
        >>> import torch
        >>> worth = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
        >>> kept = torch.rand(40, 20, generator=torch.Generator().manual_seed(1)) < 0.5
        >>> truth = SubsetTruth(kept, -(kept.float() @ worth.t()))
        >>> good, bad = compare([Scores("backwards", -worth, 1.0), Scores("exact", worth, 9.0)], truth)
        >>> good.name, round(good.lds, 3), good.better_than_chance, bad.better_than_chance, bad.behind
        ('exact', 1.0, True, False, True)
    """
    number = len(truth.kept)
    if number < 5:
        raise InputError(f"{number} subsets say nothing: retrain on at least 5.")
    twice = [name for name, times in Counter(method.name for method in scores).items() if times > 1]
    if twice:
        raise InputError(
            f"several scores are named {', '.join(map(repr, twice))}: give each a name of its own, "
            "dataclasses.replace(scores, name=...)."
        )
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, number, (resamples, number))
    tails = [(1 - level) / 2, (1 + level) / 2]
    effects = truth.losses.t().double().numpy()  # [questions, S]
    left_out = (~truth.kept).double()
    found: dict[str, tuple[float, Draws, float]] = {}
    for method in scores:
        values = method.values.double().expand(len(effects), -1)
        predicted = (values @ left_out.t()).numpy()
        spread = np.stack([_correlation(predicted[:, rows], effects[:, rows]) for rows in draws])
        found[method.name] = float(_correlation(predicted, effects)), spread, method.seconds
    ranked = sorted(found, key=lambda name: -found[name][0])
    best = found[ranked[0]][1]
    rows = []
    for name in ranked:
        lds, spread, seconds = found[name]
        low, high = np.quantile(spread, tails)
        behind = bool(np.quantile(best - spread, tails[0]) > 0)
        rows.append(Compared(name, lds, float(low), float(high), seconds, behind))
    return rows


def _correlation(predicted: Draws, effects: Draws) -> Draws:
    """Spearman's correlation, the mean over the questions; 0 for one that cannot be ranked."""
    from scipy.stats import rankdata

    a, b = (rankdata(x, axis=1) for x in (predicted, effects))
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    mean: Draws = np.divide((a * b).sum(1), scale, out=np.zeros_like(scale), where=scale > 0).mean()
    return mean


def recommended(rows: Sequence[Compared], matters: float = 0.0) -> Compared | None:
    """The best method, or one that is not shown to be worse and takes less than half as long.

    Args:
        rows: of `compare`.
        matters: seconds below which nobody minds.

    Returns:
        None where the best is not better than chance.

    Example:
        >>> slow, fast = Compared("slow", 0.5, 0.3, 0.7, 60.0, False), Compared("fast", 0.4, 0.2, 0.6, 2.0, False)
        >>> recommended([slow, fast]).name, recommended([slow, fast], matters=100).name
        ('fast', 'slow')
    """
    chosen: Compared | None = None
    for row in rows:
        if not row.better_than_chance or row.behind:
            continue
        if chosen is None or max(row.seconds, matters) < chosen.seconds / 2:
            chosen = row
    return chosen
