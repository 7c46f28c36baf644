"""A folder of retrainings answers for its own setting only."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import StoreError
from assay.evaluate.retraining import brittleness
from assay.evaluate.subsets import SubsetTraining, draw_subsets, retrained_losses
from assay.evaluate.task import SubsetLoop, Task

N, Q = 12, 4
Rows = tuple[Tensor, Tensor]


def data(n: int, seed: int) -> Rows:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def make_model() -> nn.Module:
    return nn.Linear(4, 3).double()


def make_deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loaded(folder: Path) -> nn.Module:
    """What the seed's file says."""
    model = make_model()
    model.load_state_dict(torch.load(folder / f"{torch.initial_seed()}.pt"))
    return model


def losses(model: nn.Module, rows: Rows) -> Tensor:
    return F.cross_entropy(model(rows[0]), rows[1], reduction="none")


def scaled(model: nn.Module, rows: Rows, by: float = 10.0) -> Tensor:
    return losses(model, rows) * by


def closure(by: float) -> Any:
    return lambda model, rows: losses(model, rows) * by


def right(model: nn.Module, rows: Rows) -> Tensor:
    return (model(rows[0]).argmax(1) == rows[1]).double()


def wrong(model: nn.Module, rows: Rows) -> Tensor:
    return 1 - right(model, rows)


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


def slow(which: int, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """One of the parameters learns more slowly."""
    rest = list(params)
    return torch.optim.SGD([{"params": [rest.pop(which)], "lr": 0.1}, {"params": rest}], lr=0.5)


TRAINING = SubsetTraining(sgd, epochs=2, batch=4)


def retrained(**given: Any) -> Tensor:
    """Four subsets, with other settings than usual where they are given."""
    usual: dict[str, Any] = {
        "make_model": make_model, "losses": losses, "data": data(N, 1), "queries": data(Q, 2), "training": TRAINING,
        "kept": draw_subsets(N, 4),
    }  # fmt: skip
    return retrained_losses(**{**usual, **given})


def with_rate(which: int) -> SubsetTraining:
    return SubsetTraining(partial(slow, which), epochs=2, batch=4)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another model": ({}, {"make_model": make_deep}, "optimizer, make_model"),
    "other losses": ({}, {"losses": scaled}, "losses, measure"),
    "another measure": ({}, {"measure": scaled}, "measure"),
    "a partial": ({"losses": partial(scaled, by=2)}, {"losses": partial(scaled, by=3)}, "losses, measure"),
    "a lambda": ({"losses": closure(2)}, {"losses": closure(3)}, "losses, measure"),
    "another group": ({"training": with_rate(0)}, {"training": with_rate(1)}, "optimizer"),
    "another shape": ({}, {"queries": tuple(x[:, None] for x in data(Q, 2))}, "queries"),
    "other data": ({}, {"data": data(N, 7)}, "data"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_of_another_setting_is_refused(name: str, tmp_path: Path) -> None:
    own, other, said = SETTINGS[name]
    first = retrained(**own, cache=tmp_path)
    assert torch.equal(retrained(**own, cache=tmp_path), first)
    with pytest.raises(StoreError, match=rf"of other data or settings \({said}\): name another cache="):
        retrained(**{**own, **other}, cache=tmp_path)


def test_a_folder_of_other_first_weights_is_refused(tmp_path: Path) -> None:
    files, cache = tmp_path / "files", tmp_path / "cache"
    files.mkdir()
    for seed in range(4):
        torch.save(make_model().state_dict(), files / f"{seed}.pt")
    make = partial(loaded, files)
    first = retrained(make_model=make, seeds=[2], cache=cache)
    both = retrained(make_model=make, seeds=[2, 3], cache=cache)  # a seed more goes on in the folder
    assert torch.equal(both[0], first[0])
    torch.save(make_model().state_dict(), files / "3.pt")
    assert torch.equal(retrained(make_model=make, seeds=[2], cache=cache), first)
    with pytest.raises(StoreError, match=r"of other data or settings \(model\)"):
        retrained(make_model=make, seeds=[2, 3], cache=cache)


def test_brittleness_says_by_what_a_prediction_is_right(tmp_path: Path) -> None:
    task = Task(losses, data(N, 1), data(Q, 2), SubsetLoop(make_model, losses, data(N, 1), TRAINING))
    scores = torch.randn(1, N, generator=torch.Generator().manual_seed(0))
    found = brittleness(task, scores, [3], right, cache=tmp_path)
    assert torch.equal(brittleness(task, scores, [3], right, cache=tmp_path).rise, found.rise)
    with pytest.raises(StoreError, match=r"\(measure\)"):
        brittleness(task, scores, [3], wrong, cache=tmp_path)
