"""Graphs that are kept from the replay of a step until its turn: the same values, within the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.demo.gpt import GPT, GPTConfig
from assay.replay import Trajectory
from assay.replay.curvature import Curvature
from assay.replay.flat import Flat
from assay.replay.graphs import Graphs
from assay.snapshots import random_state
from tests.replay.common import STEPS, Cubed, Problem, loss_fn

PROBLEMS = [
    Problem("sgd"),
    Problem("adamw", clip=0.5, micro=2, decay=0.1, schedule=True),
    Problem("nesterov", micro=3, decay=0.05),
]
LARGE = 10**12


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each gradient had that was taken up again."""
    seen: list[int] = []
    original = Curvature.__call__

    def counted(
        self: Curvature,
        batch: Any,
        rows: int,
        random: Any,
        of_g: Tensor,
        products: bool = True,
        taken: Any = None,
    ) -> Any:
        if taken is not None:
            seen.append(taken.capture.batch)
        return original(self, batch, rows, random, of_g, products, taken)

    monkeypatch.setattr(Curvature, "__call__", counted)
    return seen


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_values_are_those_without_graphs(problem: Problem, resumed: list[int]) -> None:
    ledger, model, optimizer = problem.recorded(snapshots=4)

    def values(**options: Any) -> Tensor:
        return ledger.adjoint(model, optimizer, problem.batches, loss_fn, problem.queries(), **options)

    plain = values(graphs=0)
    assert resumed == []
    kept = values(graphs=LARGE)
    assert (
        len(resumed) == (STEPS - 1) * problem.micro
    )  # all but the first step, which takes no second derivative
    assert torch.allclose(kept, plain, rtol=1e-10, atol=1e-14)


class Images(nn.Module):
    """A convolution, a batch norm that mixes nothing in evaluation mode, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(1, 3, 3), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.first(x)).flatten(1)
        hidden = F.gelu(self.inner(hidden)) * hidden
        hidden = F.dropout(self.inner(hidden), 0.2, self.training)
        return self.last(F.max_pool1d(hidden[:, None], 1)[:, 0])  # type: ignore[no-any-return]


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(11, (3, 6), generator=generator)


def pictures(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (3,), generator=generator)


def language(model: Any, batch: Tensor) -> Tensor:
    return model(batch[:, :-1], batch[:, 1:])  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Any], Any]] = {
    "gpt": (lambda: GPT(GPTConfig(vocabulary=11, context=6, layers=2, heads=2, width=8)), tokens, language),
    "images": (Images, pictures, loss_fn),
}


def trained(model: nn.Module, optimizer: Any, data: list[Any], loss: Callable[..., Tensor]) -> assay.Ledger:
    """A run over `(ids, batch)`, one of them each step."""
    with assay.Run(model, optimizer, snapshots=3) as run:
        for ids, batch in data:
            with run.step(ids):
                loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return run.ledger


@pytest.mark.parametrize("name", MODELS)
def test_models_with_dropout_ties_and_convolutions(name: str, resumed: list[int]) -> None:
    make, draw, loss = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    data = [([f"{t}-{i}" for i in range(3)], draw(generator)) for t in range(7)]
    query = draw(generator)
    ledger = trained(model, optimizer, data, loss)

    def values(graphs: int) -> Tensor:
        return ledger.adjoint(model, optimizer, lambda t: [data[t]], loss, [query], graphs=graphs)

    plain, kept = values(0), values(LARGE)
    assert resumed == [3] * 6
    assert torch.allclose(kept, plain, rtol=1e-9, atol=1e-14)


def test_as_many_are_kept_as_the_budget_holds() -> None:
    problem = Problem("sgd")
    ledger, model, optimizer = problem.recorded(snapshots=STEPS)
    records = list(Trajectory(ledger._source.snapshots).records.values())
    curvature = Curvature(model, Flat(model, optimizer), loss_fn)
    assert not curvature.keeps
    ids, batch = problem.batches(0)[0]
    directions = torch.randn(1, curvature.flat.total, dtype=torch.float64)
    curvature(batch, len(ids), random_state(model), directions)
    assert curvature.keeps
    assert curvature.held > 0

    graphs = Graphs(curvature, 3 * curvature.held + 1, first=0)
    graphs.begin(records)
    wanted = []
    for record in records:
        if graphs.wants(record.step):
            wanted.append(record.step)
            graphs.note([curvature.keep(batch, len(ids), record.random[0])])
    assert wanted == [6, 7, 8]  # the last of the segment

    graphs = Graphs(curvature, 0, first=0)
    graphs.begin(records)
    assert not any(graphs.wants(record.step) for record in records)


def test_a_kept_graph_survives_a_step_of_the_optimizer() -> None:
    problem = Problem("adamw")
    model = problem.model()
    optimizer = problem.optimizer(model)
    flat = Flat(model, optimizer)
    curvature = Curvature(model, flat, loss_fn)
    (ids, batch), random = problem.batches(0)[0], random_state(model)
    along = torch.randn(2, flat.total, dtype=torch.float64)
    for _ in range(2):
        truth = curvature(batch, len(ids), random, along)
    before = flat.weights()
    taken = curvature.keep(batch, len(ids), random)
    optimizer.zero_grad()
    taken.accumulate(flat)
    optimizer.step()
    assert not torch.equal(flat.weights(), before)
    flat.put(before)
    found = curvature(batch, len(ids), random, along, taken=taken)
    assert truth.products is not None
    assert found.products is not None
    assert torch.allclose(found.products, truth.products, rtol=1e-12, atol=1e-15)
    assert torch.allclose(found.scores, truth.scores, rtol=1e-12, atol=1e-15)


class Sometimes(nn.Module):
    """Differentiable twice except for some inputs, which look like all others until they are differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.final = True  # whether there are such inputs at all

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        final = self.final and bool(x[0, 0] > 10)
        return self.last(Cubed.apply(hidden) if final else hidden**3)  # type: ignore[no-any-return,no-untyped-call]


def test_a_kept_graph_without_a_second_derivative_is_done_without(resumed: list[int]) -> None:
    torch.manual_seed(0)
    model = Sometimes().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(1)
    data = []
    for step in range(6):
        x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        x[0, 0] = 11.0 if step == 2 else 1.0
        data.append(([3 * step + row for row in range(3)], (x, torch.randint(3, (3,), generator=generator))))
    query = data[0][1]
    ledger = trained(model, optimizer, data, loss_fn)

    def values() -> Tensor:
        return ledger.adjoint(model, optimizer, lambda t: [data[t]], loss_fn, [query] * 2, graphs=LARGE)

    with pytest.warns(assay.AssayWarning, match="cannot be differentiated twice") as warned:
        found = values()
    assert len(warned) == 1
    assert 3 in resumed  # graphs were kept, of that step too
    model.final = False
    truth = values()
    assert (found - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize("budget", ["plenty", -1, True])
def test_a_budget_that_cannot_be_read(budget: Any) -> None:
    problem = Problem("sgd")
    ledger, model, optimizer = problem.recorded()
    with pytest.raises(assay.InputError, match=r"adjoint\(graphs=...\): .* is no size"):
        ledger.adjoint(model, optimizer, problem.batches, loss_fn, problem.queries(), graphs=budget)
