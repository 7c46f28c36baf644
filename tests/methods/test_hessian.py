"""path="hessian" against explicit Hessian matrices and the Shapley value of the quadratic utility over all subsets."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from methods.slow import (
    OPTIMIZERS,
    Moment,
    Weights,
    batch,
    gradient_at,
    loss_at,
    loss_fn,
    row,
    times,
    train,
    values_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

import assay


def flat(w: Weights) -> Tensor:
    return torch.cat([x.flatten() for x in w.values()])


def hessian(at: Weights, target: assay.Target) -> Tensor:
    shapes = {k: w.shape for k, w in at.items()}

    def loss(x: Tensor) -> Tensor:
        parts = x.split([s.numel() for s in shapes.values()])
        return loss_at({k: p.view(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}, target)

    found = torch.autograd.functional.hessian(loss, flat(at))
    assert isinstance(found, Tensor)
    return found


def moves(moment: Moment) -> list[Tensor]:
    """K g_i of the samples, then what is carried and what is decayed."""
    samples = [flat(times(moment.gain, g)) for _, g in moment.samples]
    return [*samples, flat(moment.carried), flat(moment.decayed)]


def shapley(players: list[Tensor], g: Tensor, H: Tensor) -> list[float]:
    """Over all subsets, of the utility gᵀx − ½ xᵀHx."""
    n = len(players)

    def utility(subset: tuple[int, ...]) -> float:
        x = sum((players[i] for i in subset), torch.zeros_like(g))
        return float(g @ x - 0.5 * x @ H @ x)

    result = []
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        total = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            for subset in itertools.combinations(rest, size):
                total += weight * (utility((*subset, i)) - utility(subset))
        result.append(total)
    return result


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov_l2", "adamw", "rmsprop", "adafactor"])
def test_it_is_the_shapley_value_of_the_quadratic_utility(optimizer: str) -> None:
    target = assay.Target([batch(4, 900), batch(2, 901)], loss_fn)
    run, moments, _ = train(OPTIMIZERS[optimizer], {"loss": target}, path="hessian", clip=0.05)
    for step, moment in enumerate(moments):
        g, H = flat(gradient_at(moment.before, target)), hessian(moment.before, target)
        expected = shapley(moves(moment), g, H)
        line = row(run, step, "loss")
        found = [v for _, v in values_of(run, step, "loss")] + [line["carried"], line["decayed"]]
        scale = max(map(abs, expected))
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-10 * scale
        u = flat(moment.before) - flat(
            moment.after
        )  # efficiency: all players together have the whole utility
        assert abs(sum(found) - float(g @ u - 0.5 * u @ H @ u)) < 1e-10 * scale


class Attentive(nn.Module):
    """Attention through the fused kernel, which cannot be differentiated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).unsqueeze(1).chunk(3, -1)  # each [B, 1, T, 8]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.squeeze(1).mean(1))
        return out


class Once(torch.autograd.Function):
    """tanh that refuses a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gy * (1 - y * y)


class OnceNet(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.out = nn.Linear(8, 3)
        self.squash = torch.tanh if twice else Once.apply

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(self.squash(self.embed(tokens).mean(1)))
        return out


def one_step(model: nn.Module, path: str) -> assay.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    target = assay.Target([batch(4, 900)], loss_fn)
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley(target, path=path)])
    with run.step([0, 1, 2]):
        loss_fn(model, batch(3, 0)).backward()
    optimizer.step()
    run.close()
    return run


def test_fused_attention_is_switched_for_this_pass() -> None:
    torch.manual_seed(0)
    model = Attentive().double()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    found = one_step(model, "hessian").ledger.account()
    u = {k: before[k] - p.detach() for k, p in model.named_parameters()}

    def loss(s: Tensor) -> Tensor:
        moved = {k: before[k] - s * u[k] for k in before}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return loss_fn(lambda x: torch.func.functional_call(model, moved, (x,)), batch(4, 900))

    zero = torch.zeros((), dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, zero)
    bend = torch.autograd.functional.hessian(loss, zero)
    assert found["predicted"][0] == pytest.approx(float(-slope - 0.5 * bend), rel=1e-9)


def test_what_has_no_second_derivative_is_differenced_and_said() -> None:
    models = []
    for twice in (True, False):
        torch.manual_seed(0)
        models.append(OnceNet(twice).double())
    exact = one_step(models[0], "hessian").ledger.steps()["value"]
    with pytest.warns(assay.AssayWarning, match="cannot be differentiated twice.*central differences"):
        differenced = one_step(models[1], "hessian").ledger.steps()["value"]
    assert (exact - differenced).abs().max() < 1e-8 * exact.abs().max()
