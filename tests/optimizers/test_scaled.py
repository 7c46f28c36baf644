"""Fused optimizers that divide by GradScaler's scale inside ``step()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers.cases import FUSED, Case, gradients, values
from torch.optim import SGD, Optimizer

from assay.optimizers import Split, model_of


def build(kind: type[Optimizer]) -> tuple[list[torch.nn.Parameter], Optimizer]:
    more = {"momentum": 0.9} if kind is SGD else {}
    return Case(kind, {"lr": 0.05, "weight_decay": 0.1, "fused": True, **more}).build()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", FUSED)
def test_split_contains_the_loss_scale(kind: type[Optimizer], unscale: bool) -> None:
    params, optimizer = build(kind)
    model, scaler = model_of(optimizer), torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))  # the scaler starts lazily
    seen: list[tuple[float, list[Split]]] = []

    def split_all(*_: Any) -> None:
        seen.append((float(model.grad_scale()), [model.split(p) for p in params]))

    optimizer.register_step_pre_hook(split_all)
    for _ in gradients(params, steps=3, missing=False):
        grads = [p.grad.clone() for p in params]
        for p in params:
            p.grad.mul_(64.0)
        if unscale:
            scaler.unscale_(optimizer)
        received = [p.grad.clone() for p in params]
        before = values(params)
        scaler.step(optimizer)
        scaler.update()
        scale, splits = seen[-1]
        assert scale == (1.0 if unscale else 64.0)
        for p, w, g, r, split in zip(params, before, grads, received, splits, strict=True):
            torch.testing.assert_close(r, g if unscale else 64.0 * g)
            predicted = model.lr(0) * split.gain * r + split.carried + split.decayed
            torch.testing.assert_close(predicted, w - p.detach(), rtol=1e-12, atol=1e-12)
    assert model.grad_scale() == 1.0


@pytest.mark.parametrize("kind", FUSED)
def test_an_overflow_moves_nothing(kind: type[Optimizer]) -> None:
    params, optimizer = build(kind)
    for _ in gradients(params, steps=1, missing=False):
        optimizer.step()
    model, scaler = model_of(optimizer), torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))
    seen: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.overflowed()))
    assert not model.overflowed()
    params[0].grad[0, 0] = torch.inf
    before = values(params)
    scaler.step(optimizer)
    assert all(torch.equal(w, p.detach()) for w, p in zip(before, params, strict=True))
    assert seen == [True]
    for p in params:
        p.grad = torch.ones_like(p)
    scaler.update()
    scaler.step(optimizer)
    assert seen == [True, False]
    assert not model.overflowed()  # outside of a step nobody looks


def test_steps_that_were_all_skipped_foresee_nothing() -> None:
    """A skipped first step leaves a state with step 0, and 0/0 as bias-corrected moment."""
    params, optimizer = build(torch.optim.Adam)
    model, scaler = model_of(optimizer), torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    scaler.step(optimizer)
    assert float(optimizer.state[params[0]]["step"]) == 0.0
    assert [model.previous_gain(p) for p in params] == [None] * len(params)
