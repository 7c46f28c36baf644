"""A target is any differentiable scalar of the model: its values add up to that scalar's own change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from methods.slow import OPTIMIZERS, Batch, batch, dot, loss_at, mean_gradient, row, times, train, values_of
from methods.test_paths import RULES
from torch import Tensor

import assay

Model = Callable[[Tensor], Tensor]


def accuracy_margin(model: Model, data: Batch) -> Tensor:
    """How far the best wrong class is above the right one, `[B]` averaged."""
    logits = model(data[0])  # [B, 3]
    right = logits.gather(1, data[1][:, None])
    wrong = logits.scatter(1, data[1][:, None], -torch.inf).amax(1)
    return (wrong - right[:, 0]).mean()


def log_odds(model: Model, data: Batch) -> Tensor:
    """Minus the log-odds of answering 2 and not 0 to one question."""
    logits = model(data[0][:1]).log_softmax(-1)[0]
    return logits[0] - logits[2]


def reward(model: Model, data: Batch) -> Tensor:
    """Minus the expected reward of answers drawn from the model."""
    rewards = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    return -(model(data[0]).softmax(-1) @ rewards).mean()


SCALARS = {"margin": accuracy_margin, "log-odds": log_odds, "reward": reward}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_values_of_any_scalar(optimizer: str) -> None:
    targets = {name: assay.Target([batch(4, 900)], scalar) for name, scalar in SCALARS.items()}
    run, moments, _ = train(OPTIMIZERS[optimizer], targets, path="simpson")
    for name, target in targets.items():
        for step, moment in enumerate(moments):
            mean = mean_gradient(moment, target, RULES["simpson"])
            for (_, found), (_, g) in zip(values_of(run, step, name), moment.samples, strict=True):
                assert found == pytest.approx(dot(mean, times(moment.gain, g)), rel=1e-9, abs=1e-14)
            drop = float(loss_at(moment.before, target) - loss_at(moment.after, target))
            assert row(run, step, name)["actual"] == pytest.approx(drop, abs=1e-13)
        account = run.ledger.account(name)
        # the steps are long, and the margin has a kink where the best wrong class changes
        assert account["residual"].abs().sum() < 0.05 * account["actual"].abs().sum()  # type: ignore[operator]
