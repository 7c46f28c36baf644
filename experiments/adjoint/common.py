"""What the experiments share: one run watched by every method, and how values are held against the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import assay
from assay.evaluate import Removal, rank_correlation

PATHS = ("left", "trapezoid")


def dot_products(
    model: nn.Module,
    queries: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    samples: Sequence[Any],
) -> Tensor:
    """`[queries, samples]`: the plain dot product of gradients at the final weights."""

    def gradient(batch: Any) -> Tensor:
        found = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
        return torch.cat([g.flatten() for g in found])

    model.eval()
    return torch.stack([gradient(q) for q in queries]) @ torch.stack([gradient(s) for s in samples]).t()


def in_run_values(ledger: assay.Ledger) -> Tensor:
    """`[targets, rows]`, the rows as in `ledger.rows`."""
    found = [ledger.steps(target)["value"].to_list() for target in ledger.targets]
    return torch.tensor(found, dtype=torch.float64)


def places(ledger: assay.Ledger, removals: Sequence[Removal]) -> list[int]:
    """Where in `ledger.rows` the one term of each removal is."""
    first: dict[int, int] = {}
    for n, step in enumerate(ledger.rows["step"]):
        first.setdefault(step, n)
    return [first[step] + row for ((step, row),) in removals]


def spearman(found: Tensor, truth: Tensor) -> float:
    """Rank correlation, averaged over the queries."""
    return float(rank_correlation(found.double(), truth.double()).mean())


def by_id(ledger: assay.Ledger, values: Tensor, ids: int) -> Tensor:
    """`[queries, ids]`: the values of each sample summed over its steps; ids are 0 to `ids` − 1."""
    place = torch.tensor(ledger.rows["id"].to_list())
    return torch.zeros(len(values), ids, dtype=torch.float64).index_add(1, place, values.double())


Watched = tuple[assay.Ledger, nn.Module, Optimizer]
