"""A loop that copies every micro-batch into the same tensors: what is kept of one does not change with the next."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedding.runs import recorded as recording
from reference import CASES, plan, train, values
from reference.compare import one_target, recorded, relative_error, snapshots_of_plain_training, valuation
from reference.settings import OPTIMIZERS
from torch import Tensor, nn

import assay

WIDTH, STEPS, SAMPLES = 40, 4, 4


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("name", ["gpt", "mlp_tokens", "cnn"])
def test_values_are_the_dense_ones(name: str, memory: str) -> None:
    """Accumulation under AdamW: all micro-batches but the last are gone when their values are formed."""
    case, build = CASES[name], OPTIMIZERS["adamw"]
    loss = next(iter(case.losses.values()))
    data, targets = plan(case, sizes=(4, 4)), one_target(case, loss, 3)
    expected = values(snapshots_of_plain_training(case, loss, build, data), loss, targets)["held_out"]
    buffers = {key: torch.empty_like(x) for key, x in data[0][0][1].items()}
    batches = iter([batch for step in data for _, batch in step])

    @contextmanager
    def around(ids: Any) -> Iterator[None]:
        for key, x in next(batches).items():
            buffers[key].copy_(x)
        with run.step(ids):
            yield

    model = case.model()
    optimizer = build(model)
    run = assay.Run(model, optimizer, methods=[valuation(targets, memory)])
    train(model, optimizer, [[(ids, buffers) for ids, _ in step] for step in data], loss, record=around)
    run.close()
    assert relative_error(recorded(run.ledger), expected) <= case.tolerance


class _Masked(nn.Module):
    """A weight that is computed from another with numbers of the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(50, WIDTH) / 6), nn.Linear(50, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.weight * mask)))  # type: ignore[no-any-return]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 50), nn.Tanh(), nn.Linear(50, 3))


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(*batch[:-1]), batch[-1])


def _trained(build: Callable[[], nn.Module], reused: bool, accumulated: int, method: Any) -> assay.Run:
    """The same training from fresh tensors or from reused ones; `method(batch)` makes what is measured."""
    torch.manual_seed(0)
    model = build().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def draw() -> list[Tensor]:
        x, y = torch.randn(SAMPLES, WIDTH, dtype=torch.float64), torch.randint(3, (SAMPLES,))
        return [x, *([torch.rand(WIDTH, dtype=torch.float64)] if build is _Masked else []), y]

    data, held = [draw() for _ in range(STEPS)], draw()
    run = assay.Run(model, optimizer, methods=[method(held)])
    buffers = [torch.empty_like(x) for x in held]
    for t, batch in enumerate(data):
        if reused:
            batch = [buffer.copy_(x) for buffer, x in zip(buffers, batch, strict=True)]
        with run.step([f"{t}-{i}" for i in range(SAMPLES)]):
            (_loss(model, batch) / accumulated).backward()
        if (t + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    run.close()
    return run


@pytest.mark.parametrize("build", [_mlp, _Masked], ids=["mlp", "masked weight"])
@pytest.mark.parametrize(
    ("accumulated", "settings"),
    [
        (2, {"path": "left"}),
        (1, {"path": "trapezoid"}),
        (1, {"path": "simpson", "memory": "reduced"}),
        (1, {"path": "trapezoid", "memory": "recompute"}),
        (1, {"path": "left", "momentum": "exact"}),
        (1, {"path": "left", "momentum": "sketch"}),
    ],
    ids=str,
)
def test_values_are_those_from_fresh_tensors(
    build: Callable[[], nn.Module], accumulated: int, settings: dict[str, Any]
) -> None:
    """Wherever gradients wait, in every form in which they do."""

    def method(held: Any) -> assay.InRunShapley:
        return assay.InRunShapley(assay.Target([held], _loss), **settings)

    fresh, reused = (_trained(build, again, accumulated, method).ledger for again in (False, True))
    assert relative_error(recorded(reused, "target"), recorded(fresh, "target")) <= 1e-12


@pytest.mark.parametrize("support", [None, 8], ids=["whole", "support"])
def test_recorded_gradients_are_those_from_fresh_tensors(support: int | None) -> None:
    """Of the samples and of the draws of their curvature."""

    def method(_: Any) -> assay.DataValueEmbedding:
        projection = assay.Projection(rank=4, support=support)
        return assay.DataValueEmbedding(projection=projection, curvature="ggn", dtype="fp64")

    fresh, reused = (recording(_trained(_mlp, again, 2, method)) for again in (False, True))
    torch.testing.assert_close(reused.read(0, reused.length), fresh.read(0, fresh.length))


def test_weights_of_the_samples_may_be_written_over() -> None:
    """What `run.step(ids, weights)` was given is the user's as well."""
    torch.manual_seed(0)
    model = _mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = assay.Run(model, optimizer, methods=[assay.DataValueEmbedding(dtype="fp64")])
    weights = torch.full((SAMPLES,), 0.5, dtype=torch.float64)
    with run.step(range(SAMPLES), weights):
        model(torch.randn(SAMPLES, WIDTH, dtype=torch.float64)).square().sum().backward()
    weights.zero_()
    optimizer.step()
    run.close()
    assert recording(run).weights.tolist() == [0.5] * SAMPLES
