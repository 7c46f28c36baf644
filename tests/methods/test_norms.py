"""Norms and cosines of per-sample gradients against one backward pass per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import CASES, plan
from torch import Tensor, nn

import assay
from assay.capture import gradients

CLIP = 0.05


def alone(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
    """All parameters' gradient of one loss, as one vector."""
    found = torch.autograd.grad(loss(model, batch), list(model.parameters()), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("block", [1 << 25, 1], ids=["at once", "one by one"])
@pytest.mark.parametrize("granularity", [None, "sample", "token"])
@pytest.mark.parametrize("name", ["gpt", "gpt2", "two_modules_one_weight", "routed", "raw_parameters", "cnn"])
def test_against_single_samples(
    name: str, granularity: str | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied weights, two micro-batches, clipping; beside another method or alone."""
    if granularity == "token" and name not in ("gpt", "gpt2"):
        pytest.skip("no tokens")
    monkeypatch.setattr(gradients, "ENTRIES", block)
    case = CASES[name]
    loss = case.losses["sum"] if "sum" in case.losses else next(iter(case.losses.values()))
    model = case.model()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    target = assay.Target([case.batch(2, seed=7)], loss)
    methods: list[Any] = [assay.GradientNorms({"held out": target})]
    if granularity is not None:
        methods.append(assay.InRunShapley({"t": target}, granularity=granularity))
    data, expected = plan(case, steps=2, sizes=(3, 2)), []
    with assay.Run(model, optim, methods=methods) as run:
        for step, micro in enumerate(data):
            model.eval()
            held_out = alone(model, loss, target.batches[0])
            rows = []
            for ids, batch in micro:
                for i, own in enumerate(ids):
                    one = {k: x[i : i + 1] for k, x in batch.items()}
                    rows.append((step, own, alone(model, case.losses["sum"], one)))
            model.train()
            for ids, batch in micro:
                with run.step(ids):
                    case.losses["sum"](model, batch).backward()
            before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            c = float(after.norm() / before.norm())
            whole = torch.stack([g for _, _, g in rows]).sum(0)
            expected += [
                (
                    s,
                    own,
                    c * g.norm(),
                    torch.cosine_similarity(g, whole, 0),
                    torch.cosine_similarity(g, held_out, 0),
                )
                for s, own, g in rows
            ]
            optim.step()
            optim.zero_grad()
    found = run.ledger.norms()
    assert found.columns == ["step", "id", "norm", "cosine", "cosine:held out"]
    for got, (step, own, *numbers) in zip(found.iter_rows(), expected, strict=True):
        assert got[:2] == (step, own)
        assert got[2:] == pytest.approx([float(x) for x in numbers], rel=1e-8, abs=1e-10)


def test_steps_between_are_left_out_and_a_zero_gradient_has_no_direction() -> None:
    model = nn.Linear(3, 1, bias=False)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    with assay.Run(model, optim, methods=[assay.GradientNorms(every=2)]) as run:
        for _ in range(3):
            with run.step(["zero", "one"]):
                model(torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])).sum().backward()
            optim.step()
            optim.zero_grad()
    assert run.ledger.norms().rows() == [
        (0, "zero", 0.0, None), (0, "one", 2.0, 1.0), (2, "zero", 0.0, None), (2, "one", 2.0, 1.0),
    ]  # fmt: skip


def test_a_fallback_has_no_norms() -> None:
    """Forward mode answers inner products only."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.rot90(torch.rot90(x, 1), -1))

    model = Turned()
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    run = assay.Run(model, optim, methods=[assay.GradientNorms()])
    with run.step([1, 2]):
        model(torch.randn(2, 3)).sum().backward()
    with pytest.raises(assay.CoverageError, match=r"inner\.weight.*exclude=\['inner\.weight'\]"):
        optim.step()


@pytest.mark.parametrize(
    "make",
    [lambda: assay.GradientNorms(every=0), lambda: assay.GradientNorms({"t": "loss"})],  # type: ignore[dict-item]
    ids=["every", "target"],
)
def test_settings_that_do_not_exist(make: Callable[[], object]) -> None:
    with pytest.raises(assay.InputError, match="GradientNorms"):
        make()
