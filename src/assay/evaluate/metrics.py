"""How good scores are: at finding what was planted, at retrieving what is right, at choosing what to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from assay.errors import InputError
from assay.evaluate.intervals import Score, mean_with_interval

__all__ = ["Detection", "Retrieval", "best", "detection", "retrieval"]


@dataclass(frozen=True)
class Detection:
    """How well a score tells the planted examples (flipped labels, copies) from the others.

    Args:
        auroc: area under the receiver operating characteristic; 0.5 is chance.
        auprc: average precision; the share of planted ones is chance.
    """

    auroc: Score
    auprc: Score


def detection(
    suspicion: Tensor, planted: Tensor, *, level: float = 0.95, resamples: int = 500, seed: int = 0
) -> Detection:
    """AUROC and AUPRC with bootstrap intervals over the examples, planted and others resampled apart.

    Args:
        suspicion: `[N]`, high where an example is held to be planted: minus the value, for flipped labels.
        planted: `[N]` bool.
        level: of the intervals.
        resamples: of the examples; 0 leaves the intervals NaN.
        seed: of the resampling.

    Raises:
        InputError: nothing is planted, or everything.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.

    Example:
        >>> found = detection(torch.tensor([0.9, 0.1, 0.8, 0.3]), torch.tensor([1, 0, 0, 1]).bool())
        >>> found.auroc.mean, round(found.auprc.mean, 3)
        (0.75, 0.833)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, truth = suspicion.double().cpu().numpy(), planted.bool().cpu().numpy()
    if scores.shape != truth.shape or truth.all() or not truth.any():
        raise InputError(
            f"detection: suspicion {list(scores.shape)}, planted {list(truth.shape)} with {int(truth.sum())} planted; "
            "give [N] and [N] with some planted and some not."
        )
    places = [np.flatnonzero(truth), np.flatnonzero(~truth)]
    generator = np.random.default_rng(seed)
    draws = [np.concatenate([generator.choice(p, len(p)) for p in places]) for _ in range(resamples)]

    def measured(measure: object) -> Score:
        spread = [measure(truth[rows], scores[rows]) for rows in draws]  # type: ignore[operator]
        tails = (1 - level) / 2
        low, high = np.quantile(spread, [tails, 1 - tails]) if spread else (np.nan, np.nan)
        mean = float(measure(truth, scores))  # type: ignore[operator]
        return Score(mean, float(low), float(high), torch.tensor([mean], dtype=torch.float64))

    return Detection(measured(roc_auc_score), measured(average_precision_score))


@dataclass(frozen=True)
class Retrieval:
    """Where the right example stands in each query's ranking.

    Args:
        rank: of the first right example, from 1, the mean over the queries.
        recall: k → the share of the right examples that are among the first k, the mean over the queries.
    """

    rank: Score
    recall: dict[int, Score]


def retrieval(scores: Tensor, right: Tensor, ks: Sequence[int] = (1, 10)) -> Retrieval:
    """Mean rank and recall, with bootstrap intervals over the queries. Equal scores share their mean rank.

    Args:
        scores: `[Q, N]`, or `[1, N]` for a score that does not know the queries.
        right: `[Q, N]` bool, or `[Q]` with the number of the right example of each query.
        ks: for recall.

    Raises:
        InputError: the shapes do not fit, or a query has no right example.

    Example:
        >>> found = retrieval(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([0, 2]), ks=[1])
        >>> found.rank.mean, found.recall[1].mean
        (2.0, 0.5)
    """
    from scipy.stats import rankdata

    if right.dim() == 1:
        right = torch.nn.functional.one_hot(right, scores.shape[1]).bool()
    if right.shape[1] != scores.shape[1] or len(scores) not in (1, len(right)) or not right.any(1).all():
        raise InputError(
            f"retrieval: scores {list(scores.shape)}, right {list(right.shape)}; give [Q, N] and [Q, N] with a right "
            "example for each query."
        )
    ranks = torch.from_numpy(rankdata(-scores.expand(len(right), -1).double().cpu().numpy(), axis=1))
    first = ranks.where(right, torch.inf).amin(1)
    recall = {k: mean_with_interval((right & (ranks <= k)).sum(1).double() / right.sum(1)) for k in ks}
    return Retrieval(mean_with_interval(first), recall)


def best(scores: Tensor, share: float) -> Tensor:
    """`[N]` bool: the best share of the examples by `[N]` scores; of equal ones the first.

    Example:
        >>> best(torch.tensor([0.1, 0.7, 0.5, 0.2]), 0.5)
        tensor([False,  True,  True, False])
    """
    size = round(share * len(scores))
    if not 0 < size <= len(scores):
        raise InputError(f"best(share={share}) of {len(scores)} examples is {size} of them.")
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:size]] = True
    return kept
