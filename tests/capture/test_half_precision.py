"""The start-up checks of a model in half precision: its rounding is no fault, and a fault is not lost in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.test_refusals import Doubling
from torch import Tensor, nn

import assay
from assay.capture import Capture, Weights
from assay.capture.factors import Dense, Factors, Lookup
from assay.capture.layout import Layout
from assay.capture.precision import FullPrecision, Roundings

ROWS, LENGTH, WORDS, WIDTH = 6, 5, 20, 16


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


class Residual(nn.Module):
    """Layers beside a residual stream, with a head that is tied to the embedding."""

    def __init__(self, depth: int, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.between = between

    def forward(self, ids: Tensor) -> Tensor:
        x = self.between(self.table(ids))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return F.linear(self.norm(x), self.table.weight)


def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def steps(
    model: nn.Module,
    where: str,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_fn,
    micro: int = 1,
    inputs: Callable[[], Tensor] = lambda: torch.randint(WORDS, (ROWS, LENGTH)),
) -> assay.Run:
    """In bfloat16: autocast "around" the loss, or "inside" of `forward` (as Accelerate's), or the "parameters"."""
    if where == "inside":
        model.forward = half()(model.forward)  # type: ignore[operator]
    if where == "parameters":
        model = model.bfloat16()

    def measured(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
            return loss(module, x)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    methods = [assay.InRunShapley({"t": assay.Target([inputs()], measured)})]
    run = assay.Run(model, optimizer, methods=methods)
    for number in range(micro):
        with run.step(range(number * ROWS, (number + 1) * ROWS)):
            measured(model, inputs()).backward()
    optimizer.step()
    run.close()
    return run


@pytest.mark.parametrize("where", ["around", "inside", "parameters"])
@pytest.mark.parametrize("depth", [1, 6])
def test_rounding_is_not_refused(depth: int, where: str) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        run = steps(Residual(depth), where, micro=1 + seed % 3)
        assert set(run.coverage()["status"]) == {"exact"}


def test_parts_that_cancel_are_not_refused() -> None:
    """What rounding leaves of a sum is relative to what was added: here the samples' gradients cancel almost."""

    def cancelling(model: nn.Module, x: Tensor) -> Tensor:
        signs = torch.tensor([1.0, -1.0]).repeat(ROWS // 2)
        return (model(x).square().mean(1) * signs).sum()

    for seed in range(12):
        torch.manual_seed(seed)
        rows = torch.randn(1, 8) + 1e-3 * torch.randn(ROWS, 8)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        steps(model, "around", cancelling, inputs=lambda rows=rows: rows)


def normalised(x: Tensor) -> Tensor:
    """Over the samples, in evaluation mode too."""
    return F.batch_norm(x.mT, None, None, training=True).mT


EVERYWHERE = pytest.mark.parametrize("where", ["around", "inside", "parameters"])


@EVERYWHERE
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_samples_that_mix_are_found(seed: int, where: str) -> None:
    torch.manual_seed(seed)
    with pytest.raises(assay.CoverageError, match="do the samples mix"):
        steps(Residual(2, between=normalised), where, inputs=lambda: torch.randint(WORDS, (ROWS, 2)))


@EVERYWHERE
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_use_in_a_custom_function_is_measured_another_way(seed: int, where: str) -> None:
    torch.manual_seed(seed)
    model = Residual(2)
    first = model.layers[0]
    first.forward = lambda x: F.linear(x, first.weight) + Doubling.apply(x, first.weight)  # type: ignore[no-untyped-call]
    status = dict(steps(model, where).coverage().select("parameter", "status").iter_rows())
    assert status["layers.0.weight"] == "sample loop"


@EVERYWHERE
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_use_beside_the_model_is_found(seed: int, where: str) -> None:
    def beside(model: nn.Module, ids: Tensor) -> Tensor:
        own = Doubling.apply(F.embedding(ids, model.table.weight), model.layers[0].weight)  # type: ignore
        return loss_fn(model, ids) + 10 * own.float().square().mean()

    torch.manual_seed(seed)
    with pytest.raises(assay.CoverageError, match=r"layers\.0\.weight.*do not add up"):
        steps(Residual(2), where, beside)


class Decayed(torch.autograd.Function):
    """A loss with a penalty of a weight."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return gradient, 0.3 * weight


@EVERYWHERE
@pytest.mark.parametrize("seed", [0, 2, 3])  # with 1 the term has an angle of 88° with the random direction
def test_a_term_that_is_no_samples_is_found(seed: int, where: str) -> None:
    def decayed(model: nn.Module, ids: Tensor) -> Tensor:
        return Decayed.apply(loss_fn(model, ids), model.table.weight)  # type: ignore

    torch.manual_seed(seed)
    with pytest.raises(assay.CoverageError, match=r"table\.weight do not add up"):
        steps(Residual(2), where, decayed)


class Casting(nn.Module):
    """Runs under the autocast that it enters, and under no other precision."""

    def __init__(self, mixing: float) -> None:
        super().__init__()
        self.first, self.second, self.mixing = nn.Linear(8, 16), nn.Linear(16, 4), mixing

    def forward(self, x: Tensor) -> Tensor:
        with half():
            x = torch.tanh(self.first(x.bfloat16()))
            return self.second(x - self.mixing * x.mean(0)).float()


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_a_model_that_needs_its_autocast_is_compared_in_it(mixing: float) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        rows = torch.randn(ROWS, 8)

        def run(rows: Tensor = rows) -> assay.Run:
            return steps(Casting(mixing), "", lambda m, x: m(x).square().mean(), inputs=lambda: rows)

        if mixing:
            with pytest.raises(assay.CoverageError, match="do the samples mix"):
                run()
        else:
            run()


def test_an_index_of_a_model_whose_forward_was_wrapped() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        model = Residual(4)
        model.forward = half()(model.forward)  # type: ignore[method-assign]
        batches = [(list(range(ROWS)), torch.randint(WORDS, (ROWS, LENGTH)))]
        assay.Index.build(model, batches, loss_fn, projection=assay.Projection(rank=4))


def test_what_was_on_before_comes_back() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", enabled=False), FullPrecision("cpu") as full:
        assert not full.met
        with half():
            assert (x @ x).dtype == torch.float32
            with torch.autocast("cpu", torch.float16):
                assert (x @ x).dtype == torch.float32
        assert full.met
    assert not torch.is_autocast_enabled("cpu")
    with half():
        assert (x @ x).dtype == torch.bfloat16


def test_roundings_are_those_of_the_uses_in_half_precision() -> None:
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    step = torch.finfo(torch.bfloat16).eps
    full, low = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)
    ids = torch.tensor([1, 1])

    def found(*uses: tuple[nn.Parameter, Factors | None]) -> dict[nn.Parameter, float]:
        roundings = Roundings()
        for param, factors in uses:
            roundings.add((param,), factors)
        return {param: value / step**2 for param, value in roundings.found().items()}

    assert found((one, Dense(full)), (one, None)) == {}
    assert found((one, Dense(low)), (one, Dense(low)), (one, Dense(full))) == {one: 2}
    assert found((one, Lookup(ids, low, Layout(0, 2)))) == {one: 2}  # one row takes both
    assert found((two, Dense(full))) == {two: 1}
    assert found((one, Dense(low)), (two, None)) == {one: 1, two: 2}


def test_the_capture_notes_what_autocast_hands_to_a_layer() -> None:
    layer = nn.Linear(3, 2)
    weights = Weights([("weight", layer.weight)], {layer.weight: 0})
    roundings, x = Roundings(), torch.ones(2, 3)
    with Capture(weights, 2, strict=True) as capture:
        capture.takes.append(lambda weight, factors, _: roundings.add(weight.params, factors))
        with half():
            out = layer(x).float().sum()
        out.backward()
    assert roundings.found() == {layer.weight: torch.finfo(torch.bfloat16).eps ** 2}
