"""Whatever a training loop does around a micro-batch, the values are those of the dense reference."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from reference import CASES, Snapshot, Target, plan, snapshot, train, values, widened
from reference.cases import Batch
from reference.compare import (
    check,
    one_target,
    recorded,
    relative_error,
    snapshots_of_plain_training,
    valuation,
    valued,
)
from reference.settings import CLIP, MAIN, OPTIMIZERS
from torch import nn

import assay


@pytest.mark.parametrize("optimizer", MAIN)
@pytest.mark.parametrize("when", ["after_step", "before_step"])
def test_learning_rate_schedule(when: str, optimizer: str) -> None:
    """The rate that counts is the one that `optimizer.step()` sees, even if set after the backward pass."""
    case, build = CASES["mlp"], OPTIMIZERS[optimizer]
    loss = case.losses["sample_mean"]
    data, targets = plan(case, steps=4), one_target(case, loss, 1)

    def trained(with_assay: bool) -> tuple[list[Snapshot], assay.Ledger | None]:
        model = case.model()
        opt = build(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step) ** 2)
        snapshots: list[Snapshot] = []

        def before(number: int) -> None:
            if when == "before_step":
                for group in opt.param_groups:
                    group["lr"] = 0.01 * (number + 1)
            snapshots.append(snapshot(case, model, opt, build, data[number]))

        def after(number: int) -> None:
            if when == "after_step":
                scheduler.step()

        run = assay.Run(model, opt, out=None, methods=[valuation(targets)]) if with_assay else None
        train(model, opt, data, loss, record=run.step if run else None, before_step=before, after_step=after)
        if run:
            run.close()
        return snapshots, run.ledger if run else None

    expected = values(trained(with_assay=False)[0], loss, targets)["held_out"]
    ledger = trained(with_assay=True)[1]
    assert ledger is not None
    assert relative_error(recorded(ledger), expected) <= 1e-9


@pytest.mark.parametrize("optimizer", MAIN)
def test_ids_that_come_again(optimizer: str) -> None:
    """Within a micro-batch, within a step and over the steps: an id's occurrences add up."""
    case = CASES["mlp"]
    loss = case.losses["sample_mean"]
    data = plan(case, sizes=(4, 4), ids=lambda n: n % 3)
    targets = one_target(case, loss, 5)
    check(case, loss, OPTIMIZERS[optimizer], data, targets)
    ledger = valued(case, loss, OPTIMIZERS[optimizer], data, targets)
    steps = recorded(ledger)
    totals = dict(ledger.values("held_out").select("id", "value").iter_rows())
    assert totals.keys() == {0, 1, 2}
    for sample, total in totals.items():
        rows = [value for step in steps for i, value in step if i == sample]
        assert total == pytest.approx(sum(rows), rel=1e-12)


IDS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "range": lambda ids: range(ids[0], ids[-1] + 1),
    "tensor": torch.tensor,
    "numpy": np.array,
    "strings": lambda ids: [f"données/{i}.txt" for i in ids],
    "numpy_strings": lambda ids: np.array([f"{i}" for i in ids]),
    "negative": lambda ids: [-1 - i for i in ids],
    "large": lambda ids: [2**62 + i for i in ids],
}


@pytest.mark.parametrize("kind", IDS)
def test_kinds_of_ids(kind: str) -> None:
    """The ledger gives back the user's own integers or strings."""
    case, build = CASES["mlp"], OPTIMIZERS["adamw"]
    loss = case.losses["sum"]
    data, targets = plan(case), one_target(case, loss, 1)
    expected = values(snapshots_of_plain_training(case, loss, build, data), loss, targets)["held_out"]
    model = case.model()
    opt = build(model)
    run = assay.Run(model, opt, out=None, methods=[valuation(targets)])
    given = [IDS[kind]([int(i) for i in ids]) for ((ids, _),) in data]
    waiting = iter(given)
    train(model, opt, data, loss, record=lambda ids: run.step(next(waiting)))
    run.close()
    plain = [ids.tolist() if hasattr(ids, "tolist") else list(ids) for ids in given]
    named = [
        [(i, value) for i, (_, value) in zip(ids, step, strict=True)]
        for ids, step in zip(plain, expected, strict=True)
    ]
    assert relative_error(recorded(run.ledger), named) <= 1e-9


@pytest.mark.parametrize("clip", [None, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize("optimizer", MAIN)
def test_scaled_loss(optimizer: str, clip: float | None) -> None:
    """A loss scale that the loop multiplies in and divides out again leaves no trace in the values."""
    case, build = CASES["mlp"], OPTIMIZERS[optimizer]
    loss = case.losses["sample_mean"]
    data, targets = plan(case, sizes=(4, 4)), one_target(case, loss, 5)
    snapshots = snapshots_of_plain_training(case, loss, build, data, clip)
    expected = values(snapshots, loss, targets, clip=clip)["held_out"]
    model = case.model()
    opt = build(model)
    run = assay.Run(model, opt, out=None, methods=[valuation(targets)])
    train(model, opt, data, loss, clip=clip, record=run.step, scale=1024.0)
    run.close()
    assert relative_error(recorded(run.ledger), expected) <= 1e-9


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
def test_grad_scaler(optimizer: str, set_to_none: bool) -> None:
    """torch's own scaler, whose second step overflows: it does not happen, and nobody gets a value for it."""
    case, build = CASES["mlp"], OPTIMIZERS[optimizer]
    loss = case.losses["sample_mean"]
    data, targets = plan(case, steps=4, dtype=torch.float32), one_target(case, loss, 5, torch.float32)
    model = case.model(torch.float32)
    opt = build(model)
    snapshots: list[Snapshot] = []
    run = assay.Run(model, opt, out=None, methods=[valuation(targets)])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for number, ((ids, batch),) in enumerate(data):
        with run.step(ids):
            scaler.scale(loss(model, batch)).backward()
        scaler.unscale_(opt)
        if number == 1:
            with torch.no_grad():
                scaler._per_optimizer_states[id(opt)]["found_inf_per_device"][torch.device("cpu")].fill_(1.0)
        else:
            snapshots.append(snapshot(case, model, opt, build, data[number]))
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none)
    run.close()
    double = {
        "held_out": Target(
            [{k: v.double() if v.is_floating_point() else v for k, v in case.batch(5, 7).items()}], loss
        )
    }
    expected = values(snapshots, loss, double, tolerance=1e-5)["held_out"]
    assert relative_error(recorded(run.ledger), expected) <= 1e-4


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw_large_eps"])
@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "mlp", "cnn", "gpt"])
def test_half_precision(name: str, optimizer: str, mode: str) -> None:
    """In bfloat16 the values are those of float64 up to its three digits, neither refused nor off."""
    case, build = CASES[name], OPTIMIZERS[optimizer]
    loss = list(case.losses.values())[-1]
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    data, snapshots = plan(case, sizes=(4, 4), dtype=dtype), list[Snapshot]()
    held_out = case.batch(5, seed=7, dtype=dtype)

    def half(model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            return loss(model, batch)

    model = case.model(dtype)
    opt = build(model)
    run = assay.Run(model, opt, methods=[assay.InRunShapley({"held_out": assay.Target([held_out], half)})])
    train(
        model,
        opt,
        data,
        half,
        clip=CLIP,
        record=run.step,
        before_step=lambda number: snapshots.append(snapshot(case, model, opt, build, data[number])),
    )
    run.close()
    targets = {"held_out": Target([widened(held_out)], loss)}
    expected = values(snapshots, loss, targets, clip=CLIP, tolerance=0.5)["held_out"]
    assert relative_error(recorded(run.ledger), expected) <= 0.05


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
def test_discarded_gradient(optimizer: str, set_to_none: bool) -> None:
    """A micro-batch whose gradient the loop zeroes without a step has no value, and spoils none."""
    case, build = CASES["mlp"], OPTIMIZERS[optimizer]
    loss = case.losses["sample_mean"]
    data, targets = plan(case, steps=3), one_target(case, loss, 5)
    kept = [data[0], data[2]]
    expected = values(snapshots_of_plain_training(case, loss, build, kept), loss, targets)["held_out"]
    model = case.model()
    opt = build(model)
    run = assay.Run(model, opt, out=None, methods=[valuation(targets)])
    for number, ((ids, batch),) in enumerate(data):
        with run.step(ids):
            loss(model, batch).backward()
        if number != 1:
            opt.step()
        opt.zero_grad(set_to_none)
    run.close()
    assert relative_error(recorded(run.ledger), expected) <= 1e-9


def test_work_outside_of_the_steps_is_not_valued() -> None:
    """Evaluation with gradients in between, and a forward pass without them inside, change no value."""
    case, build = CASES["gpt"], OPTIMIZERS["adamw"]
    loss = case.losses["token_mean"]
    data, targets = plan(case), one_target(case, loss, 5)
    expected = values(snapshots_of_plain_training(case, loss, build, data), loss, targets)["held_out"]
    model = case.model()
    opt = build(model)
    run = assay.Run(model, opt, out=None, methods=[valuation(targets)])
    other = case.batch(3, seed=99)
    for ((ids, batch),) in data:
        torch.autograd.grad(loss(model, other), list(model.parameters()))
        with run.step(ids):
            with torch.no_grad():
                loss(model, other)
            loss(model, batch).backward()
        with torch.no_grad():
            loss(model, other)
        opt.step()
        opt.zero_grad()
    run.close()
    assert relative_error(recorded(run.ledger), expected) <= 1e-9


def test_grad_set_to_zero_instead_of_none() -> None:
    case, build = CASES["mlp"], OPTIMIZERS["adamw"]
    loss = case.losses["sample_mean"]
    data, targets = plan(case, sizes=(4, 4)), one_target(case, loss, 5)
    expected = values(snapshots_of_plain_training(case, loss, build, data, CLIP), loss, targets, clip=CLIP)
    model = case.model()
    opt = build(model)
    run = assay.Run(model, opt, out=None, methods=[valuation(targets)])
    for micro_batches in data:
        opt.zero_grad(set_to_none=False)
        for ids, batch in micro_batches:
            with run.step(ids):
                (loss(model, batch) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        opt.step()
    run.close()
    assert relative_error(recorded(run.ledger), expected["held_out"]) <= 1e-9


def test_loop_that_continues_a_trained_optimizer() -> None:
    """A run that starts in the middle of a training finds the optimizer's state as it is."""
    case, build = CASES["mlp"], OPTIMIZERS["adamw"]
    loss = case.losses["sample_mean"]
    data, targets = plan(case, steps=6), one_target(case, loss, 5)
    model = case.model()
    opt = build(model)
    train(model, opt, data[:3], loss)
    snapshots: list[Snapshot] = []
    run = assay.Run(model, opt, out=None, methods=[valuation(targets)])
    train(
        model,
        opt,
        data[3:],
        loss,
        record=run.step,
        before_step=lambda number: snapshots.append(snapshot(case, model, opt, build, data[3 + number])),
    )
    run.close()
    expected = values(snapshots, loss, targets)["held_out"]
    assert relative_error(recorded(run.ledger), expected) <= 1e-9


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "sgd_nesterov", "adamw"])
def test_account_adds_up(optimizer: str) -> None:
    """predicted sums the values; with carried and decayed it is −⟨∇ℓ, Δw⟩; actual is the measured drop."""
    case, build = CASES["mlp"], OPTIMIZERS[optimizer]
    loss = case.losses["sample_mean"]
    data, targets = plan(case, steps=4, sizes=(4, 4)), one_target(case, loss, 5)
    model = case.model()
    opt = build(model)
    run = assay.Run(model, opt, out=None, methods=[valuation(targets)])
    linear: list[float] = []
    losses: list[float] = []

    def held_out() -> torch.Tensor:
        return loss(model, targets["held_out"].batches[0])

    def before(number: int) -> None:
        gradient = torch.autograd.grad(held_out(), list(model.parameters()))
        linear.append(
            sum(float((g * p.detach()).sum()) for g, p in zip(gradient, model.parameters(), strict=True))
        )
        losses.append(held_out().item())
        before_gradient.append(list(gradient))

    def after(number: int) -> None:
        gradient = before_gradient[-1]
        linear[-1] -= sum(
            float((g * p.detach()).sum()) for g, p in zip(gradient, model.parameters(), strict=True)
        )

    before_gradient: list[list[torch.Tensor]] = []
    train(model, opt, data, loss, clip=CLIP, record=run.step, before_step=before, after_step=after)
    losses.append(held_out().item())
    run.close()
    account = run.ledger.account("held_out").sort("step")
    for name in ("predicted", "carried", "decayed", "actual", "residual"):
        assert name in account.columns
    predicted = [sum(value for _, value in step) for step in recorded(run.ledger)]
    assert account["predicted"].to_list() == pytest.approx(predicted, rel=1e-9)
    explained = account["predicted"] + account["carried"] + account["decayed"]
    assert explained.to_list() == pytest.approx(linear, rel=1e-9)
    drops = [a - b for a, b in pairwise(losses)]
    assert account["actual"].to_list() == pytest.approx(drops, rel=1e-9)
    assert (account["actual"] - explained).to_list() == pytest.approx(
        account["residual"].to_list(), rel=1e-9, abs=1e-15
    )
