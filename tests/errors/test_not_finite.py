"""Losses and weights that are not numbers: booked as such, never hidden in a sum."""

# mypy: allow-untyped-calls
from __future__ import annotations

import math

import pytest
import torch
from errors.training import LOSS, Training


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_nan_step_that_the_loop_skips(factor: float) -> None:
    """A loss that is NaN, noticed by the loop before the step: the weights stay, and so do all other values."""
    training, plain = Training(), Training()
    for number in range(5):
        if number == 2:
            ids, batch = training.data[number][0]
            with training.run.step(ids):
                (LOSS(training.model, batch) * factor).backward()
            training.optimizer.zero_grad()
            training.taken += 1
            plain.taken += 1
            continue
        training.step()
        plain.step()
    ledger, expected = training.close(), plain.close()
    finite = ledger.steps("held_out").drop_nans("value")
    assert finite["id"].to_list() == expected.steps("held_out")["id"].to_list()
    assert finite["value"].to_list() == pytest.approx(expected.steps("held_out")["value"].to_list(), rel=1e-9)
    status = ledger.account("held_out")["status"].to_list()
    assert status.count("ok") == 4
    assert set(status) <= {"ok", "nan", "skipped"}


def test_nan_step_that_the_loop_takes() -> None:
    """From then on the weights are NaN, which is the user's to see; the run goes on and says so."""
    training = Training()
    for number in range(5):
        training.step(lambda m, b, n=number: LOSS(m, b) * (math.nan if n == 2 else 1.0))  # type: ignore[misc]
    ledger = training.close()
    assert ledger.account("held_out")["status"].to_list() == ["ok", "ok", "nan", "nan", "nan"]
    values = ledger.values("held_out")
    assert values["value"].is_finite().all()
    first = ledger.steps("held_out").filter(ledger.steps("held_out")["step"] < 2)
    assert values["value"].sum() == pytest.approx(first["value"].sum(), rel=1e-12)


def test_nan_in_a_parameter_that_the_target_does_not_use() -> None:
    """0·NaN must not hide in a sum: either the value is NaN and booked so, or it is right."""
    training = Training()
    training.step()
    with torch.no_grad():
        training.model.get_parameter("net.3.bias")[0] = math.nan
    training.step()
    assert training.close().account("held_out")["status"].to_list()[1] == "nan"
