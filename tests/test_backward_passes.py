"""What counts of the backward passes inside of a step: what stands in the parameters' `.grad` at its end."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedding.runs import recorded as recording
from reference import CASES, plan, train, values
from reference.cases import Batch
from reference.compare import one_target, recorded, relative_error, snapshots_of_plain_training, valuation
from reference.settings import OPTIMIZERS
from torch import Tensor, nn

import assay

Loss = Callable[[nn.Module, Batch], Tensor]


def _logs(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """The gradient's norm for a logger."""
    found = loss(model, batch)
    torch.autograd.grad(found, list(model.parameters()), retain_graph=True, allow_unused=True)
    return found


def _attacks(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """The gradient of something that the run does not watch."""
    away = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (loss(model, batch) + away).backward(inputs=[away])
    return loss(model, batch)


def _zeroes(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """A pass whose gradients are thrown away."""
    (3 * loss(model, batch)).backward()
    model.zero_grad()
    return loss(model, batch)


def _fills_with_zeros(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    (3 * loss(model, batch)).backward()
    model.zero_grad(set_to_none=False)
    return loss(model, batch)


def _in_two(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """Two passes that count."""
    (0.25 * loss(model, batch)).backward()
    return 0.75 * loss(model, batch)


def _differentiates_twice(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """Curvature for a logger."""
    found = loss(model, batch)
    params = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(found, params, create_graph=True, allow_unused=True)
    along = sum((g.square().sum() for g in first if g is not None), torch.zeros(()))
    torch.autograd.grad(along, params, retain_graph=True, allow_unused=True)
    return found


EXTRA = [_logs, _attacks, _zeroes, _fills_with_zeros, _in_two, _differentiates_twice]


@pytest.mark.parametrize(
    ("optimizer", "memory", "strict"),
    [
        ("sgd", "keep", False),
        ("adamw", "keep", False),
        ("adamw", "keep", True),
        ("adamw", "recompute", False),
    ],
)
@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("name", ["gpt", "cnn", "checkpointed"])
def test_values_are_the_dense_ones(
    name: str, extra: Callable[..., Tensor], optimizer: str, memory: str, strict: bool
) -> None:
    """Whatever passes there are beside those of the loss."""
    if name == "checkpointed" and extra is _differentiates_twice:
        pytest.skip("torch has no second derivative of it")
    case, build = CASES[name], OPTIMIZERS[optimizer]
    loss = next(iter(case.losses.values()))
    data, targets = plan(case, steps=2), one_target(case, loss, 3)
    expected = values(snapshots_of_plain_training(case, loss, build, data), loss, targets)["held_out"]
    model = case.model()
    opt = build(model)
    run = assay.Run(model, opt, methods=[valuation(targets, memory)], strict=strict)
    train(model, opt, data, lambda model, batch: extra(model, batch, loss), record=run.step)
    run.close()
    assert relative_error(recorded(run.ledger), expected) <= case.tolerance


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("path", ["left", "trapezoid"])
def test_parameters_that_are_named_count_alone(path: str) -> None:
    """`backward(inputs=[...])` of some of the watched parameters: their gradient is there twice, the others' once."""
    model, batch, held = _network(), _batch(1), _batch(2)
    named = list(model[0].parameters())  # type: ignore[index]
    twice = {p: 1 + any(p is q for q in named) for p in model.parameters()}

    def products() -> Tensor:
        G = torch.autograd.grad(_loss(model, held), list(twice))
        each = F.cross_entropy(model(batch[0]), batch[1], reduction="none") / 4
        gradients = [torch.autograd.grad(one, list(twice), retain_graph=True) for one in each]
        return torch.stack([gradients_dot(own, G) for own in gradients])

    def gradients_dot(own: Any, G: Any) -> Tensor:
        return sum(
            (k * (g * h).sum() for k, g, h in zip(twice.values(), own, G, strict=True)), torch.zeros(())
        )

    expected = products()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)  # so small that all points of the path are one
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley(assay.Target([held], _loss), path=path)])
    with run.step(range(4)):
        _loss(model, batch).backward(inputs=named)
        _loss(model, batch).backward()
    optimizer.step()
    run.close()
    found = torch.tensor(run.ledger.values("target").sort("id")["value"].to_list()).double()
    torch.testing.assert_close(found / 1e-6, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("extra", EXTRA)
def test_recorded_gradients_are_those_of_the_loss(extra: Callable[..., Tensor]) -> None:
    """And so are the draws of their curvature."""
    if extra is _in_two:
        pytest.skip("two passes have two draws")
    found = []
    for pass_ in (lambda model, batch, loss: loss(model, batch), extra):
        model = _network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = assay.Run(
            model, optimizer, methods=[assay.DataValueEmbedding(curvature="ggn", draws="all", dtype="fp64")]
        )
        for t in range(3):
            with run.step([f"{t}-{i}" for i in range(4)]):
                pass_(model, _batch(t), _loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        run.close()
        rows = recording(run)
        found.append(rows.read(0, rows.length))
    torch.testing.assert_close(found[1], found[0])


def _refused(work: Callable[[nn.Module], None], **options: Any) -> None:
    """At a step that is not the first."""
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = assay.Target([_batch(9)], _loss)
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley(target, **options)])
    for t in range(3):
        with run.step([f"{t}-{i}" for i in range(4)]):
            if t == 2:
                work(model)
            _loss(model, _batch(t)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_changed_between_two_passes_are_refused() -> None:
    """What a sample's part in the first pass became is not known."""

    def work(model: nn.Module) -> None:
        _loss(model, _batch(5)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    with pytest.raises(assay.InputError, match="changed between two backward passes"):
        _refused(work)


def test_some_gradients_zeroed_between_two_passes_are_refused() -> None:
    """What is measured is a sum over the parameters."""

    def work(model: nn.Module) -> None:
        _loss(model, _batch(5)).backward()
        model[0].zero_grad()  # type: ignore[index]

    with pytest.raises(assay.InputError, match="some gradients were zeroed"):
        _refused(work)


def test_some_parameters_are_refused_where_all_are_taken_together() -> None:
    """A forward pass that is taken again has the gradients of all."""

    def work(model: nn.Module) -> None:
        _loss(model, _batch(5)).backward(inputs=list(model[0].parameters()))  # type: ignore[index]

    with pytest.raises(assay.InputError, match="memory='recompute' cannot take them apart"):
        _refused(work, path="trapezoid", memory="recompute")


def test_some_parameters_of_one_weight_are_refused() -> None:
    """A weight that is computed from two parameters has one gradient."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.a @ self.b).T

    model = Product().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley(assay.Target([_batch(9)], _loss))])
    with pytest.raises(assay.CoverageError, match=r"names some of a, b"), run.step(range(4)):
        _loss(model, _batch(1)).backward(inputs=[model.a])


def _penalised(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    loss = _loss(model, (x, batch[1]))
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + g.square().sum()


@pytest.mark.parametrize("strict", [False, True])
def test_a_gradient_penalty_is_refused(strict: bool) -> None:
    """A gradient of the loss in the loss has no share for every sample."""
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = assay.Target([_batch(9)], _loss)
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley(target)], strict=strict)
    with pytest.raises(assay.CoverageError, match="a gradient penalty"), run.step(range(4)):
        _penalised(model, _batch(1)).backward()


@pytest.mark.parametrize("strict", [False, True])
def test_a_gradient_penalty_trains_as_ever_where_errors_detach(strict: bool) -> None:
    """Its second derivatives are those of autograd."""
    found = []
    for watched in (False, True):
        model = _network()
        if not watched:
            _penalised(model, _batch(1)).backward()
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            methods = [assay.InRunShapley(assay.Target([_batch(9)], _loss))]
            run = assay.Run(model, optimizer, methods=methods, strict=strict, on_error="detach")
            with pytest.warns(assay.AssayWarning, match="attribution stopped"), run.step(range(4)):
                _penalised(model, _batch(1)).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0])
