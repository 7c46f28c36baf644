"""The gain that the state before a step foresees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers.cases import TABLE, Case, gradients
from torch import Tensor
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from assay.optimizers import model_of

WITH_MOMENT = {name: case for name, case in TABLE.items() if case.kind not in (SGD, Adafactor)}


def unmoved(optimizer: Optimizer, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """The gradient that leaves the (bias-corrected) second moment as it is."""
    if isinstance(optimizer, Adagrad):
        return torch.zeros_like(state["sum"])
    if isinstance(optimizer, RMSprop):
        v, alpha = state["square_avg"], group["alpha"]
        if not group["centered"]:
            return v.sqrt()
        a = state["grad_avg"]
        return a + ((v - a * a) / alpha).sqrt()  # solves ṽ_t = ṽ_{t−1} for g_t
    beta2, t = group["betas"][1], float(state["step"]) + 1
    v = state["exp_avg_sq"]
    wanted = state.get("max_exp_avg_sq", v) / (1 - beta2 ** (t - 1)) * (1 - beta2**t)
    return ((wanted - beta2 * v) / (1 - beta2)).sqrt()


@pytest.mark.parametrize("name", WITH_MOMENT)
def test_exact_where_the_moment_does_not_move(name: str) -> None:
    params, optimizer = WITH_MOMENT[name].build()
    model = model_of(optimizer)
    for _ in gradients(params, steps=6, missing=False):
        optimizer.step()
        for p in params:
            group = optimizer.param_groups[model.group_index(p)]
            g = unmoved(optimizer, group, optimizer.state[p])
            coupled = not group.get("decoupled_weight_decay", False)
            g = g - group["weight_decay"] * p.detach() if coupled else g
            foreseen = model.previous_gain(p)
            assert foreseen is not None
            gain = model.split(p, -g if group["maximize"] else g).gain
            torch.testing.assert_close(foreseen, gain, rtol=1e-11, atol=1e-11)


def test_adam_by_hand() -> None:
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Adam([w], lr=0.1, betas=(0.9, 0.95), eps=1e-6)
    for g in (torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.1, -1.0])):
        w.grad = g.double()
        optimizer.step()
    v = (
        0.95 * 0.05 * torch.tensor([1.0, 4.0, 9.0]).double()
        + 0.05 * torch.tensor([0.5, 0.1, 1.0]).double() ** 2
    )
    wanted = (1 - 0.9) / (1 - 0.9**3) / ((v / (1 - 0.95**2)).sqrt() + 1e-6)
    torch.testing.assert_close(model_of(optimizer).previous_gain(w), wanted, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adafactor])
@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_an_empty_state_foresees_nothing(kind: type[Optimizer], form: str) -> None:
    if form == "fused" and kind not in (Adam, AdamW, Adagrad):
        form = "foreach"
    params, optimizer = Case(kind, {"lr": 0.1, form: True}).build()
    model = model_of(optimizer)
    assert [model.previous_gain(p) for p in params] == [None] * len(params)
    for _ in gradients(params, steps=1, missing=False):
        optimizer.step()
    assert (model.previous_gain(params[0]) is None) == (kind is Adafactor)


def test_adagrad_with_an_initial_sum_foresees_its_first_step() -> None:
    w = torch.nn.Parameter(torch.zeros(2))
    model = model_of(Adagrad([w], lr=0.1, initial_accumulator_value=4.0))
    torch.testing.assert_close(model.previous_gain(w), torch.full((2,), 0.5))


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.kind is SGD])
def test_sgd_foresees_every_step(name: str) -> None:
    params, optimizer = TABLE[name].build()
    model = model_of(optimizer)
    assert not model.preconditioned
    for _ in gradients(params, steps=3, missing=False):
        for p in params:
            assert model.previous_gain(p) == model.split(p).gain
        optimizer.step()


@pytest.mark.parametrize("name", WITH_MOMENT)
def test_preconditioned_says_whether_the_gradient_is_in_the_gain(name: str) -> None:
    params, optimizer = WITH_MOMENT[name].build()
    model = model_of(optimizer)
    assert model.preconditioned
    for _ in gradients(params, steps=8, missing=False):  # RAdam's first steps are plain
        optimizer.step()
    p = params[0]
    moved = not torch.equal(torch.as_tensor(model.split(p).gain), torch.as_tensor(model.split(p, 9 * p).gain))
    assert moved == ("never_rectified" not in name)
