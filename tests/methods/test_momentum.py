"""The carried line shared out to earlier samples, against sums over the whole history written out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partialmethod
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from methods.slow import (
    OPTIMIZERS,
    Build,
    batch,
    dot,
    grouped,
    loss_fn,
    margin,
    mean_gradient,
    net,
    times,
    train,
    values_of,
)
from methods.test_paths import RULES
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import assay
from assay.methods.momentum import Weigher
from assay.methods.sketch import SketchTail
from assay.optimizers import model_of

WITH_MOMENTUM = ["momentum", "damped", "maximize", "adamw", "amsgrad", "nadam", "radam", "rmsprop"]


def targets() -> dict[str, assay.Target]:
    return {
        "loss": assay.Target([batch(4, 900)], loss_fn),
        "margin": assay.Target([batch(3, 902)], margin),
    }


def late(run: assay.Run, step: int, target: str) -> dict[Hashable, float]:
    """What earlier samples received at a step."""
    own = {i for i, _ in values_of(run, step, target)[:3]}
    return {i: v for i, v in values_of(run, step, target) if i not in own}


@pytest.mark.parametrize("path", ["left", "hessian", "trapezoid", "simpson"])
@pytest.mark.parametrize("optimizer", WITH_MOMENTUM)
def test_exact_shares_out_the_whole_line(optimizer: str, path: str) -> None:
    instant, _, _ = train(OPTIMIZERS[optimizer], targets(), path=path, clip=0.05)
    run, _, _ = train(OPTIMIZERS[optimizer], targets(), path=path, clip=0.05, momentum="exact")
    for name in targets():
        before, after = instant.ledger.account(name), run.ledger.account(name)
        moved = before["carried"].abs().max()
        assert isinstance(moved, float)
        assert moved > 0
        close = 1e-8 if optimizer == "nadam" else 1e-9  # NAdam keeps its product of momenta in float32
        assert after["carried"].abs().max() < close * moved
        whole, shared = (frame["predicted"] + frame["carried"] for frame in (before, after))
        assert (whole - shared).abs().max() < 1e-9 * moved
        assert (before["residual"] - after["residual"]).abs().max() < 1e-9 * moved
        for step in range(4):  # the instant values stand as they were
            assert dict(values_of(run, step, name)[:3]) == pytest.approx(dict(values_of(instant, step, name)))


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "rmsprop"])
def test_each_share_is_the_inner_product(optimizer: str) -> None:
    run, moments, model = train(
        OPTIMIZERS[optimizer], targets(), path="trapezoid", clip=0.05, momentum="exact"
    )
    assert len(run.ledger.steps("loss")) == 3 * (1 + 2 + 3 + 4)
    linear = model_of(OPTIMIZERS[optimizer](model))
    named = dict(model.named_parameters())
    for t, now in enumerate(moments):
        mean = mean_gradient(now, targets()["loss"], RULES["trapezoid"])
        found = late(run, t, "loss")
        for s, then in enumerate(moments[:t]):
            source = then if linear.buffer_is_preconditioned else now
            own = (s if source is then else t) + 1
            move = {
                k: source.gain[k]
                / source.lr[k]
                * now.lr[k]
                * (linear.tail(p, t + 1, s + 1) / linear.tail(p, own, own))
                for k, p in named.items()
            }
            for i, g in then.samples:
                assert found.pop(i) == pytest.approx(dot(mean, times(move, g)), rel=1e-9, abs=1e-15)
        assert not found


@pytest.mark.parametrize("optimizer", ["nesterov_l2", "adam_l2"])
def test_what_decay_left_in_the_buffer_stays_carried(optimizer: str) -> None:
    instant, _, _ = train(OPTIMIZERS[optimizer], targets())
    for momentum in ("exact", "sketch"):
        run, _, _ = train(OPTIMIZERS[optimizer], targets(), momentum=momentum, sketch=100_003)
        account, before = run.ledger.account("loss"), instant.ledger.account("loss")
        assert (account["carried"][2:].abs() > 1e-7).all()
        whole, shared = (frame["predicted"] + frame["carried"] for frame in (before, account))
        assert (whole - shared).abs().max() < 1e-12  # type: ignore[operator]


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "rmsprop"])
def test_a_step_that_nobody_saw_stays_carried(optimizer: str) -> None:
    """Its gradient goes on acting, but there is no sample to credit."""
    known, _, _ = train(OPTIMIZERS[optimizer], targets(), momentum="exact", steps=5)
    run, _, _ = train(OPTIMIZERS[optimizer], targets(), momentum="exact", steps=5, unattended=[2])
    instant, _, _ = train(OPTIMIZERS[optimizer], targets(), steps=5, unattended=[2])
    account = run.ledger.account("loss")
    assert account["carried"][:2].abs().max() < 1e-12  # type: ignore[operator]
    assert (account["carried"][2:].abs() > 1e-7).all()
    theirs = {i: v for i, v in late(known, 4, "loss").items() if i not in (6, 7, 8)}
    assert late(run, 3, "loss") == pytest.approx(theirs, rel=1e-9, abs=1e-14)
    before = instant.ledger.account("loss")
    whole = before["predicted"] + before["carried"]
    assert (whole - account["predicted"] - account["carried"]).abs().max() < 1e-12  # type: ignore[operator]


def test_the_horizon_is_a_bound() -> None:
    run, _, _ = train(OPTIMIZERS["adamw"], targets(), momentum="exact", horizon=2, steps=6)
    for step in range(6):
        assert len(late(run, step, "loss")) == 3 * min(step, 2)
    assert run.ledger.account("loss")["carried"][3:].abs().min() > 1e-9  # type: ignore[operator]
    assert run.ledger.table("momentum")["horizon"].to_list() == [2]


def test_the_default_horizon_carries_all_but_a_hundredth() -> None:
    run, _, _ = train(OPTIMIZERS["adamw"], targets(), momentum="exact", steps=2)
    (horizon,) = run.ledger.table("momentum")["horizon"]
    assert 0.8**horizon <= 0.01 < 0.8 ** (horizon - 1)


@pytest.mark.parametrize("momentum", ["exact", "sketch"])
def test_an_optimizer_without_momentum_has_nothing_to_share(momentum: str) -> None:
    plain, _, _ = train(OPTIMIZERS["sgd"], targets())
    run, _, _ = train(OPTIMIZERS["sgd"], targets(), momentum=momentum)
    assert run.ledger.steps("loss").equals(plain.ledger.steps("loss"))


# --- the sketch


def shared(optimizer: str, momentum: str, **options: object) -> pl.DataFrame:
    run, _, _ = train(OPTIMIZERS[optimizer], targets(), momentum=momentum, **options)  # type: ignore[arg-type]
    return run.ledger.steps("loss")


def both(optimizer: str, **options: object) -> tuple[pl.DataFrame, pl.DataFrame]:
    exact, sketched = (shared(optimizer, momentum, **options) for momentum in ("exact", "sketch"))
    assert exact["id"].equals(sketched["id"])
    return exact, sketched


@pytest.mark.parametrize("path", ["left", "simpson"])
@pytest.mark.parametrize("optimizer", [*WITH_MOMENTUM, "nesterov_l2", "adam_l2"])
def test_a_sketch_as_long_as_the_model_is_exact(optimizer: str, path: str) -> None:
    """No two entries share a number, so nothing is lost; the default horizon leaves out what comes after it."""
    exact, sketched = both(optimizer, path=path, clip=0.05, sketch=1009, sizes=(3, 2))
    worst = (exact["value"] - sketched["value"]).abs().max()
    assert worst < 1e-9 * exact["value"].abs().max()  # type: ignore[operator]


@pytest.mark.parametrize("size", [1, 7, 101])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "rmsprop"])
def test_the_total_of_a_step_is_exact_at_any_size(optimizer: str, size: int) -> None:
    exact, sketched = both(optimizer, path="trapezoid", sketch=size)
    sums = [f.group_by("step", maintain_order=True).agg(pl.col("value").sum()) for f in (exact, sketched)]
    assert sums[0]["value"].to_list() == pytest.approx(sums[1]["value"].to_list(), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_folding_is_right_on_average(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many draws of the signs the mean comes near the exact inner products, before any correction."""
    monkeypatch.setattr(SketchTail, "_corrected", lambda self, step, late, spread, carried: late)
    init, draws = SketchTail.__init__, []
    exact = shared(optimizer, "exact", sketch=23, steps=3)
    for seed in range(40):
        monkeypatch.setattr(SketchTail, "__init__", partialmethod(init, seed=seed))
        sketched = shared(optimizer, "sketch", sketch=23, steps=3)
        assert exact["id"].equals(sketched["id"])
        draws.append((sketched["value"] - exact["value"]).to_numpy())
    error = np.stack(draws)  # [draws, rows]
    noisy = error.std(0) > 0
    assert noisy.any()
    z = error.mean(0)[noisy] / (error.std(0)[noisy] / np.sqrt(len(error)))
    assert np.abs(z).max() < 4.5


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "rmsprop"])
def test_a_longer_sketch_errs_less(optimizer: str) -> None:
    errors = []
    for size in (5, 53):
        exact, sketched = both(optimizer, sketch=size, steps=8)
        errors.append(float((exact["value"] - sketched["value"]).pow(2).sum() ** 0.5))
    assert 0 < errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "rmsprop"])
def test_weights_in_half_the_bits(optimizer: str) -> None:
    """bfloat16 weights and gradients: sketch and exact shares agree to what such gradients allow."""
    frames = []
    for momentum in ("exact", "sketch"):
        model = net().to(torch.bfloat16)
        steps = OPTIMIZERS[optimizer](model)
        target = {"loss": assay.Target([batch(4, 900)], loss_fn)}
        method = assay.InRunShapley(target, "trapezoid", momentum, sketch=1009)
        with assay.Run(model, steps, methods=[method], check="off") as run:
            for step in range(4):
                with run.step([3 * step, 3 * step + 1, 3 * step + 2]):
                    loss_fn(model, batch(3, step)).backward()
                steps.step()
                steps.zero_grad()
        frames.append(run.ledger.steps()["value"])
    assert (frames[0] - frames[1]).abs().max() < 0.02 * frames[0].abs().max()  # type: ignore[operator]


# --- a loss scale that step() itself divides by, and a resumed run


class Scaled:
    """A loop under a loss scale; the fused optimizer divides by it inside `step()`."""

    def __init__(self, scales: Sequence[float]) -> None:
        self.scales = scales

    def ledger(self, build: Build, momentum: str) -> assay.Ledger:
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        optimizer = build(model)
        target = assay.Target([(torch.ones(2, 4).double(), torch.tensor([0, 1]))], loss_fn)
        generator = torch.Generator().manual_seed(1)
        method = assay.InRunShapley(target, path="trapezoid", momentum=momentum, sketch=50_021)
        with assay.Run(model, optimizer, methods=[method]) as run:
            for step, scale in enumerate(self.scales):
                x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
                with run.step([3 * step, 3 * step + 1, 3 * step + 2]):
                    (scale * loss_fn(model, (x, torch.tensor([0, 1, 2])))).backward()
                if scale != 1:
                    optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
                    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
                optimizer.step()
                optimizer.zero_grad()
        return run.ledger


@pytest.mark.parametrize("momentum", ["exact", "sketch"])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_fused_step_that_unscales(kind: type[torch.optim.Optimizer], momentum: str) -> None:
    options = {"momentum": 0.8} if kind is SGD else {"eps": 1e-3}

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return kind(model.parameters(), lr=0.05, fused=True, **options)  # type: ignore[call-arg]

    plain = Scaled([1.0] * 4).ledger(build, momentum)
    scaled = Scaled([64.0, 1024.0, 2.0, 4096.0]).ledger(build, momentum)
    assert scaled.steps()["value"].to_list() == pytest.approx(plain.steps()["value"].to_list(), rel=1e-6)


@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop])
def test_a_run_that_goes_on_from_a_checkpoint(kind: type[torch.optim.Optimizer]) -> None:
    """The buffer holds gradients of samples that this run has not seen: they stay on the line."""
    options = {"betas": (0.8, 0.95)} if kind is Adam else {"momentum": 0.8}

    def resumed(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = grouped(model, kind, lr=0.03, **options)
        for step in range(3):
            loss_fn(model, batch(3, 50 + step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    instant, _, _ = train(resumed, targets())
    for momentum in ("exact", "sketch"):
        run, _, _ = train(resumed, targets(), momentum=momentum, sketch=100_003)
        account, before = run.ledger.account("loss"), instant.ledger.account("loss")
        assert (account["carried"].abs() > 1e-7).all()
        whole, shared = (frame["predicted"] + frame["carried"] for frame in (before, account))
        assert (whole - shared).abs().max() < 1e-12  # type: ignore[operator]


def test_a_count_on_a_device_is_read_once() -> None:
    """Then it is counted along, until the optimizer's state is another one."""
    w = nn.Parameter(torch.zeros(3))
    optimizer = AdamW([w], lr=0.1)
    w.grad = torch.ones(3)
    optimizer.step()
    weigher = Weigher(model_of(optimizer), [w])
    reads: list[int] = []

    class OnADevice(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

        def to(self, *_: Any) -> Any:
            reads.append(1)
            return float(self.sum())

    for count, expected in ((4.0, [5, 6, 7]), (9.0, [10, 11])):
        optimizer.state[w]["step"] = torch.tensor(count).as_subclass(OnADevice)
        assert [weigher.count()[w] for _ in expected] == expected
    assert len(reads) == 2
