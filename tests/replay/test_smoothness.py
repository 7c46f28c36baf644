"""The metasmoothness check: high where training is gentle, low where it is chaotic, and the run is left alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from replay.common import OPTIMIZERS, Problem, loss_fn

import assay
from assay.errors import InputError

GENTLE = Problem("momentum", clip=0.4, micro=2, schedule=True)


def smoothness(problem: Problem, h: float = 0.01) -> assay.replay.Smoothness:
    ledger, model, optimizer = problem.recorded()
    return ledger.metasmoothness(model, optimizer, problem.batches, loss_fn, problem.queries(), h=h)


def test_gentle_training_is_smooth() -> None:
    found = smoothness(GENTLE, h=1e-4)
    assert found.score > 0.99
    assert (found.ratios - 1).abs().max() < 0.05
    assert not found.advice


def test_the_change_is_the_one_that_the_values_predict() -> None:
    ledger, model, optimizer = GENTLE.recorded()
    exact = ledger.adjoint(model, optimizer, GENTLE.batches, loss_fn, GENTLE.queries())
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([2 * torch.randint(2, (2,), generator=generator) - 1 for _ in range(9)])
    h = 1e-6
    weights = {(i // 2, (i % 2) * 3 + row): 1 + h * float(s) for i, s in enumerate(signs) for row in range(3)}
    moved = (GENTLE.losses(weights) - GENTLE.losses({})) / h
    predicted = -(exact.view(3, 18, 3).sum(2) * signs).sum(1)
    assert torch.allclose(moved, predicted, rtol=1e-3)


def test_wild_training_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = OPTIMIZERS["momentum"]
    monkeypatch.setitem(OPTIMIZERS, "momentum", (kind, options | {"lr": 60.0}))
    found = smoothness(dataclasses.replace(GENTLE, clip=None), h=0.05)
    assert (found.ratios - 1).abs().median() > 0.5
    assert "lower peak learning rate" in found.advice


def test_a_distance_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"h=0"):
        smoothness(GENTLE, h=0)
