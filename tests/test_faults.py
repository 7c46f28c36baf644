"""`on_error="detach"`: whatever breaks in assay, the training ends with the weights that it would have had."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods.slow import batch, loss_fn
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import assay
import assay.capture.probe
from assay.capture import Capture, Coverage
from assay.capture.fallback import Boundary
from assay.errors import AssayWarning, CoverageError, InputError
from assay.methods.session import InRunSession
from assay.optimizers.model import OptimizerModel
from assay.store import RunWriter
from assay.store.files import write_error
from assay.targets import TargetPass

Plant = Callable[[pytest.MonkeyPatch], None]
STEPS = 6


class Scaled(torch.autograd.Function):
    """What no rule follows: its parameter is left to the fallback."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).flatten(0, -2).sum(0)


class Model(nn.Module):
    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(6, 4)
        self.shift = nn.Parameter(torch.randn(4))
        self.inner = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.gain = nn.Parameter(torch.ones(5))
        self.outer = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * 1.0
        x += self.shift  # in place
        middle = (
            partial(checkpoint, self.middle, use_reentrant=False)
            if self.kind == "checkpoint"
            else self.middle
        )
        x = middle(x)
        x = Scaled.apply(x, self.gain) if self.kind == "fallback" else x * self.gain
        return self.outer(x).mean(1)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.inner(x)))


def train(
    run_options: dict[str, Any] | None,
    out: Path | None = None,
    kind: str = "plain",
    optimizer: Any = AdamW,
    steps: int = STEPS,
    ids: Callable[[int], Any] = lambda step: [f"{step}-{i}" for i in range(3)],
    **method: Any,
) -> tuple[dict[str, Tensor], assay.Run | None]:
    torch.manual_seed(0)
    model = Model(kind).double()
    opt = optimizer(model.parameters(), lr=0.02)
    run = None
    if run_options is not None:
        target = assay.Target([batch(4, 99)], loss_fn)
        run = assay.Run(model, opt, out=out, methods=[assay.InRunShapley(target, **method)], **run_options)
    for step in range(steps):
        for micro in range(2):
            loss = lambda: loss_fn(model, batch(3, 2 * step + micro)) / 2  # noqa: B023, E731
            if run is None:
                loss().backward()
            else:
                with run.step(ids(step)):
                    loss().backward()
        opt.step()
        opt.zero_grad()
    if run is not None:
        run.close()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, run


def after(
    calls: int, error: Exception, once: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function that does its work so many times and fails from then on (or once)."""

    def broken(work: Callable[..., Any]) -> Callable[..., Any]:
        done = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == calls + 1 or (done > calls and not once):
                raise error
            return work(*args, **kwargs)

        return call

    return broken


def planted(owner: Any, name: str, calls: int, error: Exception | None = None, once: bool = False) -> Plant:
    broken = after(calls, error or RuntimeError("planted"), once)
    return lambda patch: patch.setattr(owner, name, broken(getattr(owner, name)))


def full_disk(patch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    patch.setattr(RunWriter, "flush", after(0, write_error(Path("run"), full))(RunWriter.flush))


FAULTS: dict[str, tuple[Plant, dict[str, Any]]] = {
    "target's pass": (planted(TargetPass, "_gradient", 3), {}),
    "before the forward pass": (planted(Capture, "__init__", 8), {}),
    "model's inputs": (planted(Capture, "enter", 5), {}),
    "start-up check": (planted(Coverage, "note", 0, CoverageError("planted")), {}),
    "marks of a result": (planted(Capture, "_mark_result", 40), {}),
    "marks of one result": (planted(Capture, "_mark_result", 44, once=True), {}),
    "mark of a tensor": (planted(Capture, "mark_of", 301, once=True), {}),
    "use": (planted(Capture, "note", 55), {}),
    "use, checkpointed": (planted(Coverage, "note", 55), {"kind": "checkpoint"}),
    "backward of a probe": (planted(Capture, "record", 40), {}),
    "backward of one probe": (planted(Capture, "record", 41, once=True), {}),
    "backward, checkpointed": (planted(Capture, "record", 40), {"kind": "checkpoint"}),
    "backward of a linear layer": (
        planted(assay.capture.probe, "weight_gradient_and_products", 9),
        {"optimizer": SGD},
    ),
    "kept gradients": (planted(assay.capture.probe, "per_sample_gradients", 9), {}),
    "model's outputs": (planted(Boundary, "_watched", 5), {"kind": "fallback"}),
    "after the backward pass": (planted(Coverage, "check_all_seen", 5), {}),
    "optimizer's state": (planted(OptimizerModel, "parts", 3), {}),
    "valuation": (planted(InRunSession, "_settle", 2), {"path": "trapezoid"}),
    "away from the weights": (planted(TargetPass, "_gradient", 6), {"path": "simpson", "tolerance": 1e-9}),
    "momentum": (planted(InRunSession, "_book", 3), {"momentum": "exact", "horizon": 2}),
    "writing": (planted(InRunSession, "flush", 0), {"steps": 65}),
    "full disk": (full_disk, {"steps": 65}),
    "closing": (planted(InRunSession, "close", 0), {}),
    "last write": (planted(RunWriter, "close", 0), {}),
}


@pytest.fixture(scope="module")
def plain() -> Callable[..., dict[str, Tensor]]:
    known: dict[str, dict[str, Tensor]] = {}

    def trained(**options: Any) -> dict[str, Tensor]:
        options = {k: v for k, v in options.items() if k in ("kind", "optimizer", "steps")}
        key = str(sorted(options.items(), key=str))
        if key not in known:
            known[key] = train(None, **options)[0]
        return known[key]

    return trained


@pytest.mark.parametrize("name", FAULTS)
def test_training_goes_on_unharmed(
    name: str, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, options = FAULTS[name]
    expected = plain(**options)
    plant(monkeypatch)
    with pytest.warns(AssayWarning, match="attribution stopped") as told:
        weights, run = train({"on_error": "detach"}, tmp_path / "run", **options)
    monkeypatch.undo()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-10, atol=1e-10)
    assert len(told) == 1
    assert "training goes on without it" in str(told[0].message)
    assert run is not None
    assert run.faults.first is not None
    ledger = assay.open(tmp_path / "run")
    ledger.verify()
    assert run.ledger.values().height >= ledger.values().height


def test_what_was_booked_before_is_kept_and_the_reason_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = train({})
    assert whole is not None
    planted(InRunSession, "before_update", 4)(monkeypatch)
    with pytest.warns(AssayWarning, match=r"before an update \(RuntimeError: planted\)"):
        train({"on_error": "detach"}, tmp_path / "run")
    ledger = assay.open(tmp_path / "run")
    steps = ledger.steps()
    assert steps["step"].unique().sort().to_list() == [0, 1, 2, 3]
    known = whole.ledger.steps()
    assert steps.equals(known.filter(known["step"] < 4))
    assert ledger.info["detached"] == {"step": 4, "reason": "RuntimeError: planted"}


def test_wrong_ids_and_wrong_use_detach_too(tmp_path: Path, plain: Any) -> None:
    with pytest.warns(AssayWarning, match="2 ids were given"):
        weights, _ = train(
            {"on_error": "detach"}, ids=lambda step: ["a", "b"] if step == 3 else ["a", "b", "c"]
        )
    torch.testing.assert_close(weights, plain(), rtol=1e-10, atol=1e-10)


def test_the_users_own_errors_stay_the_users() -> None:
    model = Model().double()
    run = assay.Run(
        model,
        SGD(model.parameters(), lr=0.1),
        methods=[assay.InRunShapley(assay.Target([batch(2, 0)], loss_fn))],
        on_error="detach",
    )
    with pytest.raises(RuntimeError, match="mat1 and mat2"), run.step([1, 2]):
        F.linear(model.embed(batch(2, 0)[0]), model.outer.weight)
    with pytest.raises(ZeroDivisionError), run.step([1, 2]):
        raise ZeroDivisionError
    assert run.faults.first is None


def test_an_unknown_word_is_refused() -> None:
    model = Model()
    with pytest.raises(InputError, match=r"on_error='ignore'.*'raise' or 'detach'"):
        assay.Run(model, SGD(model.parameters(), lr=0.1), methods=[], on_error="ignore")
