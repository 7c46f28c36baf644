"""The adjoint against finite differences of the whole training run, in float64."""

from __future__ import annotations

import pytest
import torch
from replay.common import OPTIMIZERS, ROWS, STEPS, Problem, loss_fn

PROBLEMS = [
    Problem(name, clip, micro, decay, schedule)
    for name in OPTIMIZERS
    for clip in (None, 0.4)
    for micro, decay, schedule in ((1, 0.0, False), (2, 0.1, True))
]


def label(problem: Problem) -> str:
    parts = [
        problem.name,
        "clipped" if problem.clip else "",
        "accumulated, decayed, scheduled" if problem.micro > 1 else "",
    ]
    return " ".join(part for part in parts if part)


@pytest.mark.parametrize("problem", PROBLEMS, ids=label)
def test_values_are_the_finite_differences_of_training(problem: Problem) -> None:
    ledger, model, optimizer = problem.recorded()
    values = ledger.adjoint(model, optimizer, problem.batches, loss_fn, problem.queries())
    rows = ROWS * problem.micro
    assert values.shape == (3, STEPS * rows)
    places = [(0, 0), (1, 1), (4, rows - 1), (6, 2), (STEPS - 1, 1)]
    truth = problem.differences(places)
    found = values[:, [step * rows + row for step, row in places]]
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert ((found - truth).abs() <= 1e-5 * truth.abs() + 1e-8).all()
    assert truth.abs().min() > 1e-7


def test_accelerates_wrapper_is_what_it_wraps() -> None:
    """A Trainer hands out its optimizer in it."""
    accelerate = pytest.importorskip("accelerate")
    problem = Problem("adamw", 0.4)
    ledger, model, optimizer = problem.recorded()
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    found, expected = (
        ledger.adjoint(model, each, problem.batches, loss_fn, problem.queries())
        for each in (wrapped, optimizer)
    )
    assert torch.equal(found, expected)
    ledger.metasmoothness(model, wrapped, problem.batches, loss_fn, problem.queries())
