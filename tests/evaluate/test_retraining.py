"""What becomes of queries when examples are left out, against trainings one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import InputError
from assay.evaluate.retraining import brittleness, leave_one_out, tmc_shapley
from assay.evaluate.shapley import monte_carlo_shapley
from assay.evaluate.subsets import SubsetTraining, train_on_subsets
from assay.evaluate.task import SubsetLoop, Task
from assay.rows import Folder

N, Q = 9, 3
Rows = tuple[Tensor, Tensor]


def make_model() -> nn.Module:
    return nn.Linear(4, 2).double()


def losses(model: nn.Module, rows: Rows) -> Tensor:
    return F.cross_entropy(model(rows[0]), rows[1], reduction="none")


def correct(model: nn.Module, rows: Rows) -> Tensor:
    return (model(rows[0]).argmax(1) == rows[1]).double()


def sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)  # type: ignore[arg-type]


def data(n: int, seed: int) -> Rows:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, (x[:, 0] > 0).long()


TRAINING = SubsetTraining(sgd, epochs=2, batch=3)


@pytest.fixture
def task() -> Task:
    return Task(
        losses, data(N, 1), data(Q, 2), SubsetLoop(make_model, losses, data(N, 1), TRAINING, at_once=4)
    )


def trained(kept: Tensor, seed: int) -> nn.Module:
    model = make_model()
    weights = train_on_subsets(make_model, losses, data(N, 1), kept[None], TRAINING, seed)
    model.load_state_dict({name: w[0] for name, w in weights.items()})
    return model


def without(rows: list[int]) -> Tensor:
    kept = torch.ones(N, dtype=torch.bool)
    kept[rows] = False
    return kept


@torch.no_grad()
def test_leaving_one_out_is_training_without_it(task: Task) -> None:
    found = leave_one_out(task, [4, 0], seeds=[0, 1])
    truth = torch.zeros(Q, 2, dtype=torch.float64)
    for seed in (0, 1):
        whole = losses(trained(without([]), seed), task.queries)
        for column, i in enumerate([4, 0]):
            truth[:, column] += (losses(trained(without([i]), seed), task.queries) - whole) / 2
    torch.testing.assert_close(found, truth)
    assert found.abs().min() > 0
    with pytest.raises(InputError, match="no example 9 among 9"):
        leave_one_out(task, [9])


@torch.no_grad()
def test_brittleness_takes_the_best_of_each_query_away(task: Task) -> None:
    scores = torch.randn(Q, N, generator=torch.Generator().manual_seed(0))
    found = brittleness(task, scores, [2, 6], correct, seeds=[0, 1])
    flips = torch.zeros(2, Q)
    right = torch.zeros(Q)
    rise = torch.zeros(2, Q, dtype=torch.float64)
    for seed in (0, 1):
        whole = trained(without([]), seed)
        right += correct(whole, task.queries)
        for c, count in enumerate((2, 6)):
            for q in range(Q):
                model = trained(without(scores[q].topk(count).indices.tolist()), seed)
                rise[c, q] += (losses(model, task.queries) - losses(whole, task.queries))[q] / 2
                flips[c, q] += correct(whole, task.queries)[q] * (1 - correct(model, task.queries)[q])
    torch.testing.assert_close(found.rise, rise)
    torch.testing.assert_close(found.flipped.float(), flips / right, equal_nan=True)
    assert found.flipped.nansum() > 0


def test_one_row_of_scores_is_taken_away_for_all_queries(task: Task) -> None:
    scores = torch.randn(1, N, generator=torch.Generator().manual_seed(0))
    same = brittleness(task, scores.expand(Q, -1), [3])
    found = brittleness(task, scores, [3])
    torch.testing.assert_close(found.rise, same.rise)
    assert found.flipped.isnan().all()
    with pytest.raises(InputError, match="numbers from 1 to 8"):
        brittleness(task, scores, [9])
    with pytest.raises(InputError, match="scores of shape"):
        brittleness(task, scores[:, :4], [3])


def test_tmc_without_truncation_is_monte_carlo_on_the_same_orders(task: Task) -> None:
    found = tmc_shapley(task, 4, tolerance=0, seed=5)
    known: dict[bytes, Tensor] = {}

    def utility(mask: Tensor) -> Tensor:
        with torch.no_grad():
            return -losses(trained(mask, 0), task.queries)

    truth, errors = monte_carlo_shapley(utility, N, 4, seed=5)
    assert not known
    torch.testing.assert_close(found.values, truth.t())
    torch.testing.assert_close(found.errors, errors.t())
    assert found.trainings == 2 + 4 * (N - 1)


def test_truncated_orders_train_less_and_still_add_up(task: Task) -> None:
    whole = tmc_shapley(task, 3, tolerance=0, stride=2, seed=5)
    cut = tmc_shapley(task, 3, tolerance=0.5, stride=2, seed=5)
    assert cut.trainings < whole.trainings
    with torch.no_grad():
        ends = [losses(trained(torch.full((N,), full), 0), task.queries) for full in (False, True)]
    torch.testing.assert_close(whole.values.sum(1), ends[0] - ends[1])
    gain = (ends[0] - ends[1]).mean()
    assert abs(cut.values.sum(1).mean() - gain) <= 0.5 * abs(gain)
    with pytest.raises(InputError, match="at least 2 orders"):
        tmc_shapley(task, 1)


def test_trainings_are_kept_and_not_done_again(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmc_shapley(task, 2, stride=3, cache=tmp_path / "shapley")
    alone = leave_one_out(task, [1, 2], cache=tmp_path / "loo")
    monkeypatch.setattr("assay.evaluate.subsets.train_on_subsets", None)  # nothing may be trained any more
    torch.testing.assert_close(
        tmc_shapley(task, 2, stride=3, cache=tmp_path / "shapley").values, first.values
    )
    torch.testing.assert_close(leave_one_out(task, [1, 2], cache=tmp_path / "loo"), alone)
    assert Folder(tmp_path / "loo").read_json("settings.json")
