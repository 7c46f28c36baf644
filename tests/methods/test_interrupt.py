"""A signal in the middle of valuing a step: the step is valued at the close instead, once."""

from __future__ import annotations

import pytest
from methods.slow import batch, loss_fn, net
from torch.optim import AdamW

import assay
from assay.methods.quadrature import Quadrature


def train(path: str, interrupt_at: int | None, patch: pytest.MonkeyPatch) -> assay.Ledger:
    """Five steps; Ctrl-C while the step before `interrupt_at` is valued."""
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.03)
    run = assay.Run(
        model, optimizer, methods=[assay.InRunShapley(assay.Target([batch(4, 99)], loss_fn), path=path)]
    )

    def interrupted(*arguments: object) -> object:
        raise KeyboardInterrupt

    try:
        with run:
            for step in range(5):
                with patch.context() as local:
                    if step == interrupt_at:
                        local.setattr(Quadrature, "integrate", interrupted)
                    with run.step([f"{step}-{i}" for i in range(3)]):
                        loss_fn(model, batch(3, step)).backward()
                optimizer.step()
                optimizer.zero_grad()
    except KeyboardInterrupt:
        pass
    return run.ledger


@pytest.mark.parametrize("path", ["trapezoid", "simpson"])
def test_no_step_is_lost_or_doubled(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, whole = train(path, 3, monkeypatch), train(path, None, monkeypatch)
    assert broken.account()["step"].to_list() == [0, 1, 2]
    assert broken.account().equals(whole.account().head(3))
    assert broken.steps().equals(whole.steps().head(9))
