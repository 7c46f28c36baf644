"""Optimizers that are not the model's, or whose step is not linear in the gradient."""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import pytest
import torch
from errors.training import CASE, LOSS, Training, one_line
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import assay


def test_optimizer_of_another_model() -> None:
    other = CASE.model(seed=2)
    with pytest.raises(assay.InputError, match="optimizer") as error:
        Training(build=lambda m: SGD(other.parameters(), lr=0.1))
    assert "parameter" in one_line(error)


def test_optimizer_of_a_part_of_the_model() -> None:
    """What the optimizer does not own does not move, so that its gradients count for nothing."""
    frozen = CASE.model()
    for layer in ("net.0", "net.2"):
        frozen.get_submodule(layer).requires_grad_(False)
    training = Training(build=lambda m: SGD(m.get_submodule("net.3").parameters(), lr=0.1))
    reference = Training(
        model=frozen, build=lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    )
    for _ in range(3):
        training.step()
        reference.step()
    a, b = (t.close().steps("held_out")["value"].to_list() for t in (training, reference))
    assert a == pytest.approx(b, rel=1e-9)


class Lion(Optimizer):
    """Moves by the sign of the gradient: not linear in it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * param.grad.sign())


def test_unsupported_optimizer_is_refused_by_name() -> None:
    with pytest.raises(assay.UnsupportedOptimizerError, match="Lion") as error:
        Training(build=lambda m: Lion(m.parameters(), lr=1e-3))
    message = one_line(error)
    assert "AdamW" in message
    assert 'optimizer_model="sgd"' in message or "optimizer_model='sgd'" in message


def test_unsupported_optimizer_taken_for_sgd_on_request() -> None:
    """As if each step had been plain SGD with that optimizer's learning rate."""
    training = Training(build=lambda m: Lion(m.parameters(), lr=1e-3), optimizer_model="sgd")
    training.step()
    plain = Training(build=lambda m: SGD(m.parameters(), lr=1e-3))
    plain.step()
    a, b = (t.close().steps("held_out")["value"].to_list() for t in (training, plain))
    assert a == pytest.approx(b, rel=1e-9)


class CustomAdam(AdamW):
    """A subclass may do anything in its step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.sign_()
        super().step(closure)


def test_subclass_with_a_step_of_its_own_is_not_taken_for_its_parent() -> None:
    with pytest.raises(assay.UnsupportedOptimizerError, match="CustomAdam") as error:
        Training(build=lambda m: CustomAdam(m.parameters(), lr=1e-3))
    one_line(error)


def test_lbfgs_is_refused() -> None:
    with pytest.raises(assay.UnsupportedOptimizerError, match="LBFGS"):
        Training(build=lambda m: torch.optim.LBFGS(m.parameters()))


def test_unknown_optimizer_model() -> None:
    with pytest.raises(assay.InputError, match="optimizer_model") as error:
        Training(optimizer_model="muon")
    one_line(error)


def test_gradient_changed_by_more_than_a_factor_warns() -> None:
    """`clip_grad_value_` is no scale: a warning says that the values assume one."""
    training = Training()
    ids, batch = training.data[0][0]
    with training.run.step(ids):
        LOSS(training.model, batch).backward()
    nn.utils.clip_grad_value_(training.model.parameters(), 1e-3)
    training.update()
    with pytest.warns(assay.AssayWarning, match="clip"):
        training.close()
