"""What trainers do around a step: closures, and losses that call parts of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import assay


def mean_square(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def a_run(seed: int = 0) -> tuple[torch.nn.Sequential, torch.optim.Optimizer, assay.Run]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    held_out = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    target = assay.Target([held_out], mean_square)
    return model, optimizer, assay.Run(model, optimizer, methods=[assay.InRunShapley({"t": target})])


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(4, 3, dtype=torch.float64, generator=generator),
            torch.randn(4, 1, dtype=torch.float64, generator=generator),
        )
        for _ in range(5)
    ]


def plainly() -> tuple[Any, torch.nn.Module]:
    model, optimizer, run = a_run()
    for batch in batches():
        with run.step(range(4)):
            mean_square(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    return run.ledger, model


@pytest.mark.parametrize("named", [True, False])
def test_a_closure_gives_the_same_values(named: bool) -> None:
    """Lightning steps with a closure, in which everything happens, the clipping too."""
    model, optimizer, run = a_run()
    for batch in batches():

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            with run.step(range(4)):
                loss = mean_square(model, batch)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        optimizer.step(closure=closure) if named else optimizer.step(closure)
    run.close()
    expected, plain = plainly()
    assert run.ledger.steps().equals(expected.steps())
    assert run.ledger.account().equals(expected.account())
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_calls_parts_of_the_model() -> None:
    model, optimizer, run = a_run()
    for batch in batches():
        with run.step(range(4), inputs=batch):
            out = batch[0]
            for part in model:
                out = part(out)
            torch.nn.functional.mse_loss(out, batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    expected = plainly()[0].steps()
    found = run.ledger.steps()
    assert found.select("step", "id").equals(expected.select("step", "id"))
    assert found["value"].to_list() == pytest.approx(expected["value"].to_list(), rel=1e-9)
