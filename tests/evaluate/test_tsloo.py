"""Vectorised retraining against literal one-by-one retraining with torch.optim."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer

from assay.errors import InputError, UnsupportedOptimizerError
from assay.evaluate import Training, leave_out, linear_datamodeling_score, occurrences, rank_correlation
from assay.evaluate.tsloo import Removal

STEPS, MICRO, ROWS = 5, 2, 3
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    "adam": (Adam, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "adamw": (AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
}
CASES = [(name, clip) for name in OPTIMIZERS for clip in (None, 0.05)]


class Net(nn.Module):
    """A table of rows, dropout and a head that shares nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(torch.tanh(self.inner(self.table(x))), 0.2, self.training)
        return self.head(hidden)  # type: ignore[no-any-return]


def terms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none") / (ROWS * MICRO)


def query_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (rows,)), torch.randint(3, (rows,))


def rates(step: int) -> list[float]:
    return [0.3 / (1 + step), 0.1 / (1 + step)]


def problem(name: str, clip: float | None) -> Training:
    kind, options = OPTIMIZERS[name]
    model = Net().double()
    groups = [{"params": [model.table.weight]}, {"params": [*model.inner.parameters(), model.head.weight]}]
    data = [[batch(ROWS) for _ in range(MICRO)] for _ in range(STEPS)]
    return Training(model, kind(groups, lr=0.1, **options), data, terms, rates, clip, seed=11)


def literal(run: Training, removal: Removal, queries: Sequence[Any]) -> Tensor:
    """A user's loop, one removal."""
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    for t, micro_batches in enumerate(run.batches):
        torch.manual_seed(run.seed + t)
        for m, data in enumerate(micro_batches):
            kept = [0.0 if (t, m * ROWS + row) in removal else 1.0 for row in range(ROWS)]
            (torch.tensor(kept) * terms(model, data)).sum().backward()
        if run.clip is not None:
            clip_grad_norm_(model.parameters(), run.clip)
        for group, rate in zip(optimizer.param_groups, rates(t), strict=True):
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return torch.stack([query_loss(model, q) for q in queries])


@pytest.mark.parametrize(("name", "clip"), CASES)
def test_every_removal_is_the_retrained_one(name: str, clip: float | None) -> None:
    run = problem(name, clip)
    queries = [batch(1) for _ in range(4)]
    removals: list[Removal] = [[(t, row)] for t in (3, 0, 4) for row in (0, 5)]
    removals += [[(0, 1), (2, 4), (4, 2)], []]
    found = leave_out(run, removals, queries, query_loss, chunk=3)
    whole = literal(run, [], queries)
    truth = torch.stack([literal(run, removal, queries) - whole for removal in removals], 1)
    assert (found - truth).abs().max() <= 1e-11
    assert truth[:, :-1].abs().min() > 1e-9  # every removal says something
    assert found[:, -1].abs().max() <= 1e-14


def test_the_model_is_as_it_was() -> None:
    run = problem("adamw", None)
    before = copy.deepcopy(run.model.state_dict())
    leave_out(run, [[(0, 0)]], [batch(2)], query_loss)
    assert run.model.training
    assert all(torch.equal(x, before[name]) for name, x in run.model.state_dict().items())
    assert not run.optimizer.state


def test_occurrences_of_several_ids() -> None:
    ids = [["a", "b"], ["c", "a"], ["a", "a"]]
    assert occurrences(ids, ["a", "c"], range(1, 3)) == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_bad_input_is_named() -> None:
    run = problem("sgd", None)
    with pytest.raises(InputError, match="names row 6 of step 2, which has 6 rows"):
        leave_out(run, [[(2, 6)]], [batch(1)], query_loss)
    with pytest.raises(UnsupportedOptimizerError, match="RMSprop"):
        Training(run.model, torch.optim.RMSprop(run.model.parameters()), run.batches, terms)
    with pytest.raises(InputError, match=r"head\.weight is in no group"):
        Training(run.model, SGD([*run.model.table.parameters(), *run.model.inner.parameters()]), [], terms)


def test_rank_correlation_is_that_of_scipy() -> None:
    found, truth = torch.randn(3, 20).double().round(decimals=0), torch.randn(3, 20).double()
    expected = [spearmanr(a, b).statistic for a, b in zip(found, truth, strict=True)]
    assert torch.allclose(rank_correlation(found, truth), torch.tensor(expected))
    assert rank_correlation(torch.ones(1, 4), torch.randn(1, 4)).isnan().all()


def test_groups_of_an_additive_world_score_one() -> None:
    values = torch.randn(2, 12).double()
    groups = torch.rand(30, 12) < 0.5
    score = linear_datamodeling_score(values, groups, values @ groups.double().t())
    assert torch.allclose(score, torch.ones(2).double())
    with pytest.raises(InputError, match="give"):
        linear_datamodeling_score(values, groups[:, :5], values)
