"""The linear datamodeling score: do the values of single samples add up to what leaving out a group does?

LDS of a query = Spearman correlation, over groups S, of Σ_{i∈S} v_i with the true effect of leaving out S.

Source: Park et al., TRAK: Attributing Model Behavior at Scale, ICML 2023, arXiv 2303.14186, definition 2.3; on the
same seed and order as the run itself: Ilyas and Engstrom, MAGIC, arXiv 2504.16430, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.errors import InputError

__all__ = ["linear_datamodeling_score", "rank_correlation"]


def linear_datamodeling_score(values: Tensor, groups: Tensor, effects: Tensor) -> Tensor:
    """`[queries]`: rank correlation of the predicted with the true effects of groups.

    Args:
        values: `[queries, samples]`, positive = the sample lowered the query's loss.
        groups: `[groups, samples]`, true for the samples that are left out.
        effects: `[queries, groups]`: by how much leaving the group out raises the query's loss.

    Raises:
        InputError: the shapes do not fit.

    Example:
        >>> values = torch.tensor([[1.0, 2.0, 3.0]])
        >>> groups = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
        >>> linear_datamodeling_score(values, groups, torch.tensor([[1.1, 2.7, 5.3]]))
        tensor([1.], dtype=torch.float64)
    """
    expected = (values.shape[0], groups.shape[0])
    if groups.shape[1] != values.shape[1] or tuple(effects.shape) != expected:
        raise InputError(
            f"values {list(values.shape)}, groups {list(groups.shape)}, effects {list(effects.shape)}: give "
            "[queries, samples], [groups, samples] and [queries, groups]."
        )
    return rank_correlation(values.double() @ groups.double().t(), effects)


def rank_correlation(found: Tensor, truth: Tensor) -> Tensor:
    """`[rows]`: Spearman's correlation of each row of `found` with that of `truth`, both `[rows, n]`.

    Equal entries share their mean rank; a row that is constant has the correlation NaN.

    Example:
        >>> rank_correlation(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[3.0, 2.0, 1.0]]))
        tensor([-1.], dtype=torch.float64)
    """
    a, b = (_ranks(x) for x in (found, truth))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def _ranks(x: Tensor) -> Tensor:
    """`[rows, n]`: ranks from 1, float64."""
    rows = []
    for row in x:
        _, place, count = row.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).double()
        rows.append((last - (count.double() - 1) / 2)[place])
    return torch.stack(rows)
