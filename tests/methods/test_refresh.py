"""A target gradient that serves several steps: values and account against gradients taken in full at its weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from methods.slow import (
    OPTIMIZERS,
    batch,
    dot,
    gradient_at,
    loss_at,
    loss_fn,
    margin,
    net,
    row,
    times,
    train,
    values_of,
)
from polars.testing import assert_frame_equal
from torch.optim import AdamW

import assay
from assay.errors import InputError


def targets() -> dict[str, assay.Target]:
    return {
        "loss": assay.Target([batch(4, 900), batch(2, 901)], loss_fn),
        "margin": assay.Target([batch(3, 902)], margin),
    }


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov_l2", "adamw", "adafactor"])
@pytest.mark.parametrize("sizes", [(3,), (3, 2)])
def test_values_and_account_of_blocks(optimizer: str, sizes: tuple[int, ...]) -> None:
    """Seven steps in blocks of three: each by the gradient at its block's beginning; one row for a whole block."""
    run, moments, _ = train(OPTIMIZERS[optimizer], targets(), steps=7, sizes=sizes, refresh=3)
    for name, target in targets().items():
        account = run.ledger.account(name)
        assert account["step"].to_list() == [2, 5, 6]
        for first, last in ((0, 2), (3, 5), (6, 6)):
            gradient = gradient_at(moments[first].before, target)
            sums = torch.zeros(3, dtype=torch.float64)
            for step in range(first, last + 1):
                moment = moments[step]
                for (i, value), (j, g) in zip(values_of(run, step, name), moment.samples, strict=True):
                    assert i == j
                    assert value == pytest.approx(dot(gradient, times(moment.gain, g)), rel=1e-9, abs=1e-14)
                    sums[0] += value
                sums[1] += dot(gradient, moment.carried)
                sums[2] += dot(gradient, moment.decayed)
            found = row(run, last, name)
            drop = float(loss_at(moments[first].before, target) - loss_at(moments[last].after, target))
            assert found["actual"] == pytest.approx(drop, rel=1e-9, abs=1e-14)
            for column, value in zip(("predicted", "carried", "decayed"), sums, strict=True):
                assert found[column] == pytest.approx(float(value), rel=1e-9, abs=1e-14)
            assert found["residual"] == pytest.approx(drop - float(sums.sum()), rel=1e-9, abs=1e-13)
        whole = float(loss_at(moments[0].before, target) - loss_at(moments[-1].after, target))
        assert account["actual"].sum() == pytest.approx(whole, rel=1e-9, abs=1e-13)


def test_the_error_of_an_aged_gradient_is_measured() -> None:
    """The second block's first step is valued by both gradients; the fresh one counts."""
    run, moments, _ = train(OPTIMIZERS["adamw"], targets(), steps=4, refresh=2)
    table = run.ledger.table("refresh")
    assert table.columns == ["step", "target", "age", "fresh", "stale", "error"]
    assert table["step"].to_list() == [2, 2]
    assert table["age"].to_list() == [2, 2]
    for (name, target), found in zip(targets().items(), table.iter_rows(named=True), strict=True):
        by = {}
        for kind, at in (("fresh", 2), ("stale", 0)):
            gradient = gradient_at(moments[at].before, target)
            by[kind] = torch.tensor([dot(gradient, times(moments[2].gain, g)) for _, g in moments[2].samples])
            assert found[kind] == pytest.approx(float(by[kind].sum()), rel=1e-6, abs=1e-12)
        error = (by["stale"] - by["fresh"]).norm() / by["fresh"].norm()
        assert found["target"] == name
        assert found["error"] == pytest.approx(float(error), rel=1e-4)
        assert found["error"] > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_step_is_the_plain_left_end(optimizer: str) -> None:
    plain, refreshed = (train(OPTIMIZERS[optimizer], targets(), **more)[0] for more in ({}, {"refresh": 1}))
    for name in targets():
        assert plain.ledger.account(name).equals(refreshed.ledger.account(name))
        assert plain.ledger.steps(name).equals(refreshed.ledger.steps(name))
    assert "refresh" not in refreshed.ledger.tables


def test_tokens_add_up_to_values() -> None:
    run, _, _ = train(OPTIMIZERS["adamw"], targets(), steps=5, refresh=2, granularity="token")
    values = run.ledger.steps("loss")["value"]
    tokens = run.ledger.tokens("loss")
    assert len(values) == 15
    assert tokens["value"].sum() == pytest.approx(values.sum(), rel=1e-9)


def test_a_step_that_nobody_saw_ends_the_block() -> None:
    run, moments, _ = train(OPTIMIZERS["sgd"], targets(), steps=6, refresh=4, unattended=(2,))
    account = run.ledger.account("loss")
    assert account["step"].to_list() == [1, 4]
    target = targets()["loss"]
    ends = [(0, 1), (3, 5)]  # the unattended one has no number of the run's own
    for (first, last), actual in zip(ends, account["actual"], strict=True):
        drop = loss_at(moments[first].before, target) - loss_at(moments[last].after, target)
        assert actual == pytest.approx(float(drop), rel=1e-9)


def test_a_skipped_step_has_a_row_of_its_own() -> None:
    run, _, _ = train(OPTIMIZERS["sgd"], targets(), steps=5, refresh=4, skipped=(1,))
    account = run.ledger.account("loss").sort("step")
    assert dict(zip(account["step"], account["status"], strict=True)) == {1: "skipped", 3: "ok", 4: "ok"}
    assert account["actual"][0] == 0


def test_a_checkpoint_ends_the_block(tmp_path: Path) -> None:
    """A resumed run and one that went on have the same values and rows."""
    found = []
    for name, cut in (("whole", False), ("cut", True)):
        model = net()
        optimizer = OPTIMIZERS["momentum"](model)
        method = assay.InRunShapley(targets(), refresh=4)
        run = assay.Run(model, optimizer, out=tmp_path / name, methods=[method])
        for step in range(8):
            if step == 3:
                state = run.state_dict()
                if cut:
                    run.close()
                    method = assay.InRunShapley(targets(), refresh=4)
                    run = assay.Run(model, optimizer, out=tmp_path / name, methods=[method], resume=state)
            with run.step([3 * step, 3 * step + 1, 3 * step + 2]):
                loss_fn(model, batch(3, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        run.close()
        ledger = assay.open(tmp_path / name)
        found.append((ledger.account("loss"), ledger.steps("loss")))
    (account, values), (other_account, other_values) = found
    assert account["step"].to_list() == [2, 6, 7]
    assert_frame_equal(account, other_account, abs_tol=1e-12)
    assert values["value"].to_numpy() == pytest.approx(other_values["value"].to_numpy(), rel=1e-12)


def test_a_run_goes_on_by_the_optimizers_count_within_a_block(tmp_path: Path) -> None:
    """The account has one row for three steps; that the optimizer took two of them is found all the same."""
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    saved: dict[str, dict[str, object]] = {}

    def loop(run: assay.Run, steps: range) -> None:
        for step in steps:
            with run.step([3 * step, 3 * step + 1, 3 * step + 2]):
                loss_fn(model, batch(3, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 4:
                saved.update(
                    model=copy.deepcopy(model.state_dict()), optimizer=copy.deepcopy(optimizer.state_dict())
                )

    with assay.Run(
        model, optimizer, out=tmp_path / "run", methods=[assay.InRunShapley(targets(), refresh=3)]
    ) as run:
        loop(run, range(6))
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    method = assay.InRunShapley(targets(), refresh=3)
    with assay.Run(model, optimizer, out=tmp_path / "run", methods=[method], resume=True) as run:
        loop(run, range(5, 7))
    ledger = assay.open(tmp_path / "run")
    assert ledger.steps("loss")["step"].unique().sort().to_list() == list(range(7))
    assert ledger.account("loss")["step"].to_list() == [2, 6]  # the block that was cut has no drop of its own


@pytest.mark.parametrize(
    "options", [{"path": "trapezoid"}, {"path": "hessian"}, {"momentum": "sketch"}, {"refresh": 0}]
)
def test_refusals(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="refresh="):
        assay.InRunShapley(targets(), **{"refresh": 2, **options})  # type: ignore[arg-type]
