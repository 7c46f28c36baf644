"""What cannot be exact is found at the start, is measured another way, or is refused by name with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.capture import Capture, Weights
from assay.capture.call import RULES, Call
from assay.capture.check import check_capture
from assay.capture.factors import Outer
from assay.capture.layout import Layout

ROWS = 4


class Doubling(torch.autograd.Function):
    """A linear layer that the capture cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


def patched() -> nn.Module:
    """A module whose forward was replaced behind the rule's back."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    model[2].forward = lambda x: Doubling.apply(x, model[2].weight)
    return model


def step(model: nn.Module, x: Any = None, loss: Any = None, **options: Any) -> assay.Run:
    x = torch.randn(ROWS, 5).double() if x is None else x
    loss = loss or (lambda m, b: m(b).square().mean())
    run = assay.Run(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        methods=[assay.InRunShapley({"t": assay.Target([x], loss)})],
        **options,
    )
    with run.step(range(len(x))):
        loss(model, x).backward()
    run.optimizer.optimizer.step()
    run.close()
    return run


def test_a_use_that_bypasses_the_rules_is_found_and_measured_another_way() -> None:
    torch.manual_seed(0)
    model, x = patched(), torch.randn(ROWS, 5).double()
    found = step(model, x)
    assert dict(found.coverage().select("parameter", "status").iter_rows())["2.weight"] == "sample loop"
    torch.manual_seed(0)
    plain = patched()
    del plain[2].forward
    expected = step(plain, x)
    a, b = (run.ledger.values("t").sort("id")["value"].to_list() for run in (found, expected))
    assert a == pytest.approx(b, rel=1e-9)


def test_a_use_that_bypasses_the_rules_is_refused_where_nothing_can_measure_it() -> None:
    model = patched()
    with pytest.raises(assay.CoverageError, match=r"2\.weight.*exclude=.*2\.weight"):
        step(model, loss=lambda m, b: m(b).square().mean(), check="off")


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Call) -> Any:
        x, layout, mark = call.args[0], call.layout(call.args[0]), call.weight(call.args[1])
        return call.observe(call.run(), lambda gy, saved: [(mark, Outer(saved[0], 2 * gy, layout))], x)

    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    weights = Weights(model.named_parameters(), dict.fromkeys(model.parameters(), 0))
    monkeypatch.setitem(RULES, F.linear, wrong)
    check_capture(model, (torch.randn(ROWS, 5).double(),), {}, weights, ROWS)
    assert set(weights.uncovered) == set(model.parameters())
    assert "do not add up" in next(iter(weights.uncovered.values()))


def test_a_wrong_sample_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over the samples is right, but they are swapped."""

    def swapped(call: Call) -> Any:
        x, mark = call.args[0], call.weight(call.args[1])
        where = Layout(0, ROWS).labelled(0, torch.arange(ROWS).flip(0))
        return call.observe(call.run(), lambda gy, saved: [(mark, Outer(saved[0], gy, where))], x)

    model = nn.Linear(5, 6, bias=False).double()
    weights = Weights(model.named_parameters(), {model.weight: 0})
    monkeypatch.setitem(RULES, F.linear, swapped)
    check_capture(model, (torch.randn(ROWS, 5).double(),), {}, weights, ROWS)
    assert "its own use of it gives" in weights.uncovered[model.weight]


class Mixing(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.tanh(h - h.mean(0)))


def test_a_model_that_mixes_its_samples_is_refused() -> None:
    with pytest.raises(
        assay.CoverageError, match=r"first\.weight.*do the samples mix.*other outputs.*exclude=.*check='off'"
    ):
        step(Mixing().double())


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (nn.Embedding(9, 3, max_norm=1.0), "max_norm=1.0"),
        (nn.Embedding(9, 3, sparse=True), "sparse"),
        (nn.Embedding(9, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.EmbeddingBag(9, 3, max_norm=1.0), "max_norm=1.0"),
        (nn.EmbeddingBag(9, 3, sparse=True, mode="sum"), "sparse"),
    ],
    ids=str,
)
def test_tables_that_change_behind_autograd_are_refused(table: nn.Module, why: str) -> None:
    model = nn.Sequential(table)
    with pytest.raises(assay.CoverageError, match=rf"0\.weight.*{why}.*exclude="):
        step(model, torch.randint(0, 9, (ROWS, 5)))


def test_dropout_inside_a_fused_kernel_is_refused() -> None:
    with torch.device("meta"):
        lstm, x = nn.LSTM(5, 6, 2, dropout=0.5, batch_first=True), torch.randn(ROWS, 7, 5)
    capture = Capture(Weights(lstm.named_parameters(), dict.fromkeys(lstm.parameters(), 0)), ROWS)
    with capture, pytest.raises(assay.CoverageError, match=r"weight_ih_l0.*lstm.*nn\.Dropout"):
        lstm(x)


def test_an_unknown_mixture_is_refused_without_the_check() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.rot90(torch.rot90(x, 1), -1))

    with pytest.raises(assay.CoverageError, match=r"inner\.weight.*`linear`.*exclude=\['inner\.weight'"):
        step(Turned().double(), check="off")


def test_rows_of_nobody_with_a_gradient_are_refused() -> None:
    layout = Layout(0, 2).labelled(0, torch.tensor([0, 1, -1]))
    assert layout.per_sample_sum(torch.tensor([[1.0], [2.0], [0.0]])).tolist() == [1.0, 2.0]
    with pytest.raises(assay.CoverageError, match="belong to no sample"):
        layout.per_sample_sum(torch.ones(3, 1))


def test_an_empty_tensor_breaks_nothing() -> None:
    """A head whose rotary part has width zero."""
    layout = Layout(0, ROWS).reshaped((ROWS, 5, 0), (ROWS, 1, 5, 0))
    assert layout is not None
    assert (layout.dim, layout.per_sample_sum(torch.ones(ROWS, 1, 5, 0)).tolist()) == (0, [0.0] * ROWS)


class Caching(nn.Module):
    """Keeps what it computed from its weight in evaluation mode, until it is told to train again (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bias, self.kept = nn.Linear(5, 3), nn.Parameter(torch.randn(3)), None

    def train(self, mode: bool = True) -> nn.Module:
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.inner(x) + self.bias.exp()
        self.kept = self.bias.exp() if self.kept is None else self.kept
        return self.inner(x) + self.kept


def test_a_model_that_keeps_tensors_in_evaluation_mode() -> None:
    model, x = Caching().double(), torch.randn(ROWS, 5).double()
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    method = assay.InRunShapley({"t": assay.Target([x], lambda m, b: m(b).square().mean())}, path="simpson")
    with assay.Run(model, optim, methods=[method]) as run:
        for _ in range(3):
            with run.step(range(ROWS)):
                model(x).square().mean().backward()
            optim.step()
            optim.zero_grad()
    assert run.ledger.explained() == pytest.approx(1, abs=0.01)
