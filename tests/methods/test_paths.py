"""Every quadrature of the value's integral against dense gradients at the same points of the step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from methods.slow import (
    OPTIMIZERS,
    batch,
    dot,
    loss_at,
    loss_fn,
    margin,
    mean_gradient,
    net,
    row,
    times,
    train,
    values_of,
    weights,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_

import assay

RULES: dict[str, Sequence[tuple[float, float]]] = {
    "left": [(1, 0)],
    "trapezoid": [(1 / 2, 0), (1 / 2, 1)],
    "simpson": [(1 / 6, 0), (4 / 6, 0.5), (1 / 6, 1)],
}


def targets() -> dict[str, assay.Target]:
    """A loss over two batches, and a scalar that is no loss."""
    return {
        "loss": assay.Target([batch(4, 900), batch(2, 901)], loss_fn),
        "margin": assay.Target([batch(3, 902)], margin),
    }


@pytest.mark.parametrize("path", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", ["plain", "clipped_parts"])
def test_values_and_lines(path: str, optimizer: str, form: str) -> None:
    more = {"sizes": (3, 2), "clip": 0.05} if form == "clipped_parts" else {}
    run, moments, _ = train(OPTIMIZERS[optimizer], targets(), path=path, **more)
    for step, moment in enumerate(moments):
        for name, target in targets().items():
            mean = mean_gradient(moment, target, RULES[path])
            expected = [(i, dot(mean, times(moment.gain, g))) for i, g in moment.samples]
            found = values_of(run, step, name)
            assert [i for i, _ in found] == [i for i, _ in expected]
            scale = max(abs(v) for _, v in expected)
            assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) <= 1e-9 * scale
            line = row(run, step, name)
            drop = float(loss_at(moment.before, target) - loss_at(moment.after, target))
            assert line["carried"] == pytest.approx(dot(mean, moment.carried), rel=1e-9, abs=1e-14)
            assert line["decayed"] == pytest.approx(dot(mean, moment.decayed), rel=1e-9, abs=1e-14)
            assert line["actual"] == pytest.approx(drop, abs=1e-13)
            assert line["status"] == "ok"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_finer_path_closes_the_account_better(optimizer: str) -> None:
    missed = {}
    for path in RULES:
        run, _, _ = train(OPTIMIZERS[optimizer], targets(), path=path)
        missed[path] = run.ledger.account("loss")["residual"].abs().sum()
    assert missed["simpson"] < 0.1 * missed["trapezoid"]
    assert missed["trapezoid"] < 0.5 * missed["left"]


@pytest.mark.parametrize("path", ["trapezoid", "simpson"])
def test_steps_that_nobody_saw_and_steps_not_taken(path: str) -> None:
    run, moments, _ = train(OPTIMIZERS["adamw"], targets(), path=path, steps=6, unattended=[2], skipped=[4])
    account = run.ledger.account("loss")
    assert account["status"].to_list() == ["ok", "ok", "ok", "skipped", "ok"]
    target = targets()["loss"]
    for number, moment in [(0, 0), (1, 1), (2, 3), (4, 4)]:  # attended steps are numbered on
        mean = mean_gradient(moments[moment], target, RULES[path])
        for (_, found), (_, g) in zip(values_of(run, number, "loss"), moments[moment].samples, strict=True):
            assert found == pytest.approx(dot(mean, times(moments[moment].gain, g)), rel=1e-9)
    skipped = row(run, 3, "loss")
    assert [skipped[k] for k in ("predicted", "carried", "decayed", "actual")] == [0, 0, 0, 0]


def plain(optimizer: str, clip: float | None = None) -> nn.Module:
    model = net()
    opt = OPTIMIZERS[optimizer](model)
    for step in range(4):
        loss_fn(model, batch(3, 100 * step)).backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"path": "hessian"},
        {"path": "trapezoid"},
        {"path": "simpson"},
        {"path": "simpson", "tolerance": 1e-9},
        {"path": "trapezoid", "momentum": "exact"},
        {"path": "simpson", "momentum": "sketch"},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_training_is_what_it_is_without(options: dict[str, object], optimizer: str) -> None:
    _, _, model = train(OPTIMIZERS[optimizer], targets(), **options)
    for found, expected in zip(weights(model).values(), weights(plain(optimizer)).values(), strict=True):
        assert torch.equal(found, expected)


# --- adaptive


def test_more_points_where_the_tolerance_is_missed() -> None:
    run, _, _ = train(OPTIMIZERS["sgd"], targets(), path="trapezoid", tolerance=1e-4, steps=8)
    table = run.ledger.table("quadrature")
    assert table.columns == ["step", "points", "met", "seconds"]
    assert (table.filter(table["points"] > 2)["seconds"] > 0).all()
    assert (table.filter(table["points"] == 2)["seconds"] == 0).all()
    assert table["step"].to_list() == list(range(8))
    assert table["met"].all()
    assert len(set(table["points"])) > 1
    for name in targets():
        account = run.ledger.account(name)
        assert (account["residual"].abs() <= 1e-4 * account["actual"].abs() + 1e-14).all()


def test_points_are_the_passes_taken() -> None:
    calls: list[int] = []

    def counted(model: nn.Module, data: object) -> torch.Tensor:
        calls.append(1)
        return loss_fn(model, data)  # type: ignore[arg-type]

    target = {"loss": assay.Target([batch(4, 900)], counted)}
    run, _, _ = train(OPTIMIZERS["sgd"], target, path="simpson", tolerance=1e-5, steps=5)
    points = run.ledger.table("quadrature")["points"]
    assert points.max() > 3
    assert len(calls) == 1 + (points - 1).sum()  # neighbouring steps share a point


def test_the_rule_of_a_refined_step() -> None:
    run, moments, _ = train(
        OPTIMIZERS["adamw"], targets(), path="simpson", tolerance=1e-12, max_points=9, steps=2
    )
    assert run.ledger.table("quadrature")["points"].to_list() == [9, 9]
    assert not run.ledger.table("quadrature")["met"].any()
    inner = [(4 if j % 2 else 2, j / 8) for j in range(1, 8)]
    rule = [(w / 24, s) for w, s in [(1, 0.0), *inner, (1, 1.0)]]
    mean = mean_gradient(moments[1], targets()["loss"], rule)
    for (_, found), (_, g) in zip(values_of(run, 1, "loss"), moments[1].samples, strict=True):
        assert found == pytest.approx(dot(mean, times(moments[1].gain, g)), rel=1e-10)


def test_no_points_are_wasted_on_what_is_no_quadrature_error() -> None:
    """An excluded parameter moves the loss too: no number of points explains that."""
    model = net()
    optimizer = OPTIMIZERS["sgd"](model)
    method = assay.InRunShapley(targets(), path="simpson", tolerance=1e-3, max_points=1025)
    with assay.Run(model, optimizer, methods=[method], exclude=["outer.*"]) as run:
        for step in range(3):
            with run.step([0, 1, 2]):
                loss_fn(model, batch(3, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    table = run.ledger.table("quadrature")
    assert not table["met"].any()
    assert table["points"].max() <= 17


# --- what is told


def trained_on() -> assay.Target:
    """The batches of `train`, so that the loss falls."""
    return assay.Target([batch(3, seed) for seed in (0, 100, 200, 300)], loss_fn)


def test_the_explained_share_draws_a_warning_that_says_what_to_do() -> None:
    one = {"loss": trained_on()}
    with pytest.warns(
        assay.AssayWarning, match=r"after \d+ steps the account explains .*lower the learning rate"
    ):
        run, _, _ = train(OPTIMIZERS["adamw"], one, path="left", steps=70, band=(0.999, 1.001))
    assert run.status().explained["loss"] == pytest.approx(run.ledger.explained("loss"))


def test_no_warning_inside_the_band() -> None:
    run, _, _ = train(OPTIMIZERS["adamw"], {"loss": trained_on()}, path="simpson", steps=70)
    assert 0.9 < run.status().explained["loss"] < 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "left", "tolerance": 0.1}, "tolerance=0.1.*path='left'"),
        ({"path": "simpson", "tolerance": 0.0}, "above 0"),
        ({"max_points": 2}, "max_points=2"),
        ({"sketch": 0}, "sketch=0"),
        ({"horizon": 0}, "horizon=0"),
        ({"band": (1.1, 2.0)}, "band"),
    ],
)
def test_choices_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(assay.errors.InputError, match=message):
        assay.InRunShapley(targets(), **options)  # type: ignore[arg-type]
