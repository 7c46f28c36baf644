"""A training run with assay that can go wrong in one way at a time, and what its error must be like."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference import CASES, plan
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import assay

CASE = CASES["mlp"]
LOSS = CASE.losses["sample_mean"]
Batch = dict[str, Tensor]


class Training:
    """An MLP in training with assay, one optimizer step per `step`."""

    def __init__(
        self,
        out: Path | None = None,
        target_loss: Callable[[nn.Module, Batch], Any] = LOSS,
        build: Callable[[nn.Module], Optimizer] = lambda m: AdamW(m.parameters(), lr=0.01),
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.model = CASE.model() if model is None else model
        self.optimizer = build(self.model)
        target = assay.Target([CASE.batch(3, seed=7)], target_loss)
        methods = [assay.InRunShapley(targets={"held_out": target})]
        self.run = assay.Run(self.model, self.optimizer, out=out, methods=methods, **options)
        self.data = plan(CASE, steps=30)
        self.taken = 0

    def step(self, loss: Callable[[nn.Module, Batch], Tensor] = LOSS, ids: Any = None) -> None:
        own, batch = self.data[self.taken][0]
        with self.run.step(own if ids is None else ids):
            loss(self.model, batch).backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1

    def close(self) -> assay.Ledger:
        self.run.close()
        return self.run.ledger


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert 20 < len(message) < 400
    return message


def is_whole(ledger: assay.Ledger, steps: int, samples: int = 4) -> None:
    """All of so many steps are there, each value a number, each account closed."""
    frame = ledger.steps("held_out")
    assert frame["step"].n_unique() == steps
    assert len(frame) == steps * samples
    assert frame["value"].is_finite().all()
    assert ledger.account("held_out")["status"].to_list() == ["ok"] * steps
