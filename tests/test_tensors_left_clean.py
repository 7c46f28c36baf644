"""Nothing of assay's stays on the user's tensors once a step, or an index, is done with them."""

# mypy: allow-untyped-calls
from __future__ import annotations

import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.capture.bottleneck import stream_factors
from assay.capture.weights import Weights


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def marked() -> Callable[[], list[Tensor]]:
    """The tensors of this test that carry a mark; others may have left some that used a capture by itself."""

    def all_of_them() -> list[Tensor]:
        return [x for x in gc.get_objects() if issubclass(type(x), Tensor) and "_assay" in vars(x)]

    before = all_of_them()
    return lambda: [x for x in all_of_them() if not any(x is other for other in before)]


def test_a_mark_is_found(marked: Callable[[], list[Tensor]]) -> None:
    x = torch.ones(2)
    assert not marked()
    x._assay = None  # type: ignore[attr-defined]
    assert [y is x for y in marked()] == [True]


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "left"},
        {"path": "trapezoid"},
        {"path": "trapezoid", "memory": "recompute"},
        {"path": "left", "target_gradient": "factors"},
    ],
    ids=str,
)
def test_after_a_step(settings: dict[str, Any], marked: Callable[[], list[Tensor]]) -> None:
    """Batch, outputs, loss and buffers can be saved, and loaded without assay."""
    model, x, y = _network(), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = assay.Target([(x[:1].clone(), y[:1])], _loss)
    run = assay.Run(model.eval(), optimizer, methods=[assay.InRunShapley(target, **settings)])
    for t in range(2):
        with run.step([f"{t}-{i}" for i in range(4)]):
            out = model(x)
            loss = F.cross_entropy(out, y)
            loss.backward(retain_graph=True)  # what lies between is still there
            left = {"loss": loss.detach(), "out": out.detach().cpu(), "x": x, "y": y, **model.state_dict()}
        optimizer.step()
        optimizer.zero_grad()
        assert not marked()
    run.close()
    assert not marked()
    file = io.BytesIO()
    torch.save(left, file)
    file.seek(0)
    assert torch.load(file).keys() == left.keys()


def test_after_a_step_that_failed(marked: Callable[[], list[Tensor]]) -> None:
    """An error of the loop's own leaves them as clean."""
    model, x = _network(), torch.randn(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (x.clone(), torch.tensor([0, 1, 2, 0]))
    run = assay.Run(model.eval(), optimizer, methods=[assay.InRunShapley(assay.Target([batch], _loss))])
    kept: list[Tensor] = []

    def work() -> None:
        with run.step(range(4)):
            kept.append(model(x))
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert kept
    assert not marked()


def test_after_the_factors_of_a_batch(marked: Callable[[], list[Tensor]]) -> None:
    """As an index takes them."""
    model, batch = _network(), (torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    named = list(model.named_parameters())
    weights = Weights(named, {p: 0 for _, p in named}, model.buffers())
    stream_factors(model, weights, _loss, batch, 4, lambda weight, factors: None, check=True)
    assert not marked()
