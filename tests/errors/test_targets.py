"""Targets that give no loss, and settings that do not exist."""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from errors.training import CASE, LOSS, Batch, Training, one_line
from torch import Tensor, nn

import assay


def _per_sample(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


TARGETS: dict[str, Callable[[nn.Module, Batch], Any]] = {
    "a vector": _per_sample,
    "a number": lambda model, batch: 1.5,
    "nothing": lambda model, batch: None,
    "no gradient": lambda model, batch: torch.tensor(1.5),
    "detached": lambda model, batch: LOSS(model, batch).detach(),
    "nan": lambda model, batch: LOSS(model, batch) * math.nan,
    "infinite": lambda model, batch: LOSS(model, batch) * math.inf,
    "integer": lambda model, batch: torch.tensor(3),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_unusable_target(kind: str) -> None:
    """Said at the start or at the first step, by the target's name, before a weight has moved."""
    model = CASE.model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(assay.InputError, match="'held_out'") as error:
        Training(model=model, target_loss=TARGETS[kind]).step()
    message = one_line(error)
    if kind in ("a vector", "a number", "nothing"):
        assert "scalar" in message
    if kind in ("nan", "infinite"):
        assert "nan" in message.lower() or "inf" in message.lower()
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_target_that_becomes_nan() -> None:
    """Later on it does not stop the training: its steps are booked as "nan" and the ones before stay."""
    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return LOSS(model, batch) * (math.nan if calls > 4 else 1.0)

    training = Training(target_loss=loss)
    for _ in range(6):
        training.step()
    ledger = training.close()
    status = ledger.account("held_out")["status"].to_list()
    assert len(status) == 6
    assert status[:2] == ["ok", "ok"]
    assert status[-1] == "nan"
    assert ledger.values("held_out")["value"].is_finite().all()


def test_error_in_the_targets_own_loss_leaves_the_model_in_order() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise KeyError("labels")

    model = CASE.model()
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="labels"):
        Training(model=model, target_loss=loss).step()
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "make",
    [
        lambda: assay.InRunShapley(targets={}),
        lambda: assay.InRunShapley(targets={"a": LOSS}),  # type: ignore[dict-item]
        lambda: assay.InRunShapley(targets={"a": assay.Target([1], LOSS)}, path="nearest"),
        lambda: assay.InRunShapley(targets={"a": assay.Target([1], LOSS)}, momentum="all"),
        lambda: assay.Target([], LOSS),
        lambda: assay.Target([1], "cross_entropy"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_do_not_exist(make: Callable[[], object]) -> None:
    with pytest.raises(assay.InputError) as error:
        make()
    one_line(error)
