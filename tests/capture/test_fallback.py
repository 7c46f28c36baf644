"""The fallbacks at the model's boundary, against plain autograd and against the fast path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay

TEXTS, SIZE = 4, 5


class Cube(torch.autograd.Function):
    """Has no forward-mode formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Turned(nn.Module):
    """Turns its hidden layer there and back by an operation that no rule of tracking knows."""

    def __init__(
        self, *, turn: bool = True, cube: bool = False, dropout: float = 0.0, norm: bool = False
    ) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(SIZE, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.dropout, self.turn, self.cube = nn.Dropout(dropout), turn, cube

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.norm(self.dropout(torch.tanh(self.first(x))))
        h = torch.rot90(torch.rot90(h, 1), -1) if self.turn else h
        h = self.second(h)
        h = self.third(Cube.apply(h) if self.cube else h**3)
        return h if labels is None else {"loss": F.cross_entropy(h, labels), "logits": h}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(*batch)["loss"]
    return found


def batch(seed: int, rows: int = TEXTS) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, SIZE, generator=generator).double(), torch.randint(
        0, 3, (rows,), generator=generator
    )


def train(optimizer: str = "SGD", loss_fn: Any = loss, **options: Any) -> assay.Run:
    torch.manual_seed(1)
    model = Turned(**options).double()
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05)
    target = assay.Target([batch(9, 7)], loss_fn)
    with assay.Run(model, optim, methods=[assay.InRunShapley({"held out": target})]) as run:
        for step in range(3):
            for part in range(2):
                with run.step(range(TEXTS * part, TEXTS * part + TEXTS)):
                    (loss_fn(model, batch(2 * step + part)) / 2).backward()
            optim.step()
            optim.zero_grad()
    return run


def values(run: assay.Run) -> Tensor:
    return torch.tensor(run.ledger.values("held out").sort("id")["value"].to_list(), dtype=torch.float64)


def statuses(run: assay.Run) -> dict[str, str]:
    return dict(run.coverage().select("parameter", "status").iter_rows())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_mode_gives_what_the_fast_path_gives(optimizer: str, dropout: float) -> None:
    run = train(optimizer, dropout=dropout)
    assert statuses(run)["first.weight"] == "exact"
    assert statuses(run)["second.weight"] == statuses(run)["third.bias"] == "forward mode"
    torch.testing.assert_close(
        values(run), values(train(optimizer, turn=False, dropout=dropout)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_single_samples_where_forward_mode_has_no_formula(optimizer: str) -> None:
    run = train(optimizer, cube=True)
    assert statuses(run)["second.weight"] == "sample loop"
    torch.testing.assert_close(values(run), values(train(optimizer, turn=False)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cube", [False, True], ids=["forward mode", "sample loop"])
def test_a_loss_that_the_model_computes_itself(cube: bool) -> None:
    run = train("AdamW", own_loss, cube=cube)
    assert statuses(run)["second.weight"] == ("sample loop" if cube else "forward mode")
    torch.testing.assert_close(values(run), values(train("AdamW", turn=False)), rtol=1e-9, atol=1e-12)


def test_cost_is_reported() -> None:
    operations = train().coverage().filter(parameter="second.weight")["operations"].item()
    assert "forward passes" in operations


def test_training_is_left_alone() -> None:
    run = train(dropout=0.4)
    torch.manual_seed(1)
    model = Turned(dropout=0.4).double()
    optim = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        for part in range(2):
            (loss(model, batch(2 * step + part)) / 2).backward()
        optim.step()
        optim.zero_grad()
    for found, expected in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_random_numbers_are_refused_in_the_sample_loop() -> None:
    with pytest.raises(assay.CoverageError, match=r"second.weight.*random numbers"):
        train(cube=True, dropout=0.4)


def test_batch_normalisation_is_refused_in_training_mode() -> None:
    with pytest.raises(assay.CoverageError, match=r"norm.*mixes the samples"):
        train(norm=True)


def test_a_pass_around_the_model_is_refused() -> None:
    def around(model: Any, rows: Any) -> Tensor:
        x, y = rows
        if not calls:
            calls.append(True)
            return loss(model, rows)  # the first step goes through the model, for the start-up check
        return F.cross_entropy(model.third(model.second(torch.tanh(model.first(x)))), y)

    calls: list[bool] = []
    model = Turned().double()
    optim = torch.optim.SGD(model.parameters(), lr=0.05)
    run = assay.Run(model, optim, methods=[assay.InRunShapley({"t": assay.Target([batch(9)], loss)})])
    first, second = batch(0), batch(1)
    with run.step(range(TEXTS)):
        around(model, first).backward()
    with pytest.raises(assay.CoverageError, match=r"second.weight.*not called"), run.step(range(TEXTS)):
        around(model, second).backward()
