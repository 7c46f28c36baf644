"""What waits for the right end: per-sample gradients, rounded ones, or the inputs to take the pass again."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from methods.slow import OPTIMIZERS, batch, grouped, loss_fn, margin, net, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import assay
from assay.capture import Capture


def targets() -> dict[str, assay.Target]:
    return {
        "loss": assay.Target([batch(4, 900), batch(2, 901)], loss_fn),
        "margin": assay.Target([batch(3, 902)], margin),
    }


# --- taken again


@pytest.mark.parametrize("path", ["left", "hessian", "trapezoid", "simpson"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_recomputed_values_are_those_of_kept_gradients(path: str, optimizer: str) -> None:
    runs = [
        train(OPTIMIZERS[optimizer], targets(), path=path, sizes=(3, 2), clip=0.05, memory=memory)
        for memory in ("keep", "recompute")
    ]
    for name in targets():
        kept, again = (run.ledger.steps(name) for run, _, _ in runs)
        assert kept["id"].equals(again["id"])
        worst = (kept["value"] - again["value"]).abs().max()
        assert worst <= 1e-12 * kept["value"].abs().max()  # type: ignore[operator]
    for kept, again in zip(runs[0][2].parameters(), runs[1][2].parameters(), strict=True):
        assert torch.equal(kept, again)  # training is not disturbed


class Noisy(nn.Module):
    """Dropout, a checkpoint, a loss of its own, and a buffer of B rows that every pass changes."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("shift", torch.zeros(3, 1))
        self.reentrant = reentrant

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.shift.add_(0.1)

        def inner(x: Tensor) -> Tensor:
            return F.dropout(torch.tanh(self.first(x)) + self.shift.sum(), 0.4, self.training)

        hidden = checkpoint(inner, x, use_reentrant=self.reentrant)
        logits = self.last(hidden)
        return F.cross_entropy(logits, y), logits


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("path", ["left", "trapezoid"])
def test_random_numbers_buffers_and_checkpoints_are_as_they_were(path: str, reentrant: bool) -> None:
    found = []
    for memory in ("keep", "recompute"):
        torch.manual_seed(0)
        model = Noisy(reentrant).double()
        optimizer = AdamW(model.parameters(), lr=0.05)
        data = torch.randn(5, 3, 4, dtype=torch.float64)
        labels = torch.tensor([0, 1, 2])
        target = assay.Target([(data[4], labels)], lambda m, b: m(*b)[0])
        method = assay.InRunShapley(target, path, memory=memory)
        with assay.Run(model, optimizer, methods=[method], check="off") as run:
            for step in range(4):
                with run.step([3 * step, 3 * step + 1, 3 * step + 2]):
                    loss, logits = model(data[step].clone().requires_grad_(), labels)
                    (loss + 0.1 * logits.square().mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(
            (
                run.ledger.steps()["value"],
                model.shift.clone(),
                [p.detach().clone() for p in model.parameters()],
            )
        )
    (kept, shift, weights), (again, other_shift, other_weights) = found
    assert (kept - again).abs().max() <= 1e-12 * kept.abs().max()  # type: ignore[operator]
    assert torch.equal(shift, other_shift)
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_gradients_that_stand_are_left_alone() -> None:
    """`zero_grad()` after the next step has begun: what stands in `.grad` then is not touched."""
    model = net()
    optimizer = OPTIMIZERS["adamw"](model)
    method = assay.InRunShapley(targets(), "trapezoid", memory="recompute")
    standing: dict[nn.Parameter, Tensor] = {}
    with assay.Run(model, optimizer, methods=[method]) as run:
        for step in range(3):
            with run.step([0, 1, 2]):
                for p, g in standing.items():
                    assert torch.equal(p.grad, g)
                optimizer.zero_grad()
                loss_fn(model, batch(3, step)).backward()
            optimizer.step()
            standing = {p: p.grad.clone() for p in model.parameters()}


def test_uses_outside_of_the_models_pass_are_refused() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model)
    method = assay.InRunShapley(targets(), memory="recompute")
    run = assay.Run(model, optimizer, methods=[method], check="off")
    tokens, labels = batch(3, 0)
    with run.step([0, 1, 2]):
        hidden = torch.tanh(model.inner(model.embed(tokens)))
        (loss_fn(model, (tokens, labels)) + hidden.square().mean()).backward()
    with pytest.raises(assay.errors.CoverageError, match=r"memory='recompute'.* 2 uses .*memory='keep'"):
        optimizer.step()


class Counting(nn.Module):
    """State outside of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.layer(x) * self.calls
        return out


def test_a_pass_that_cannot_be_repeated_is_refused() -> None:
    model = Counting()
    optimizer = AdamW(model.parameters())
    target = assay.Target([(torch.ones(2, 4), torch.tensor([0, 1]))], loss_fn)
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley(target, memory="recompute")], check="off")
    with run.step([0, 1]):
        loss_fn(model, (torch.ones(2, 4), torch.tensor([0, 1]))).backward()
    with pytest.raises(assay.errors.CoverageError, match="gives other outputs when it is taken again"):
        optimizer.step()


# --- rounded


def single(optimizer: str, path: str, memory: str, **options: Any) -> assay.Run:
    """A run in float32, in which there is something to round."""
    model = net().float()
    kind, more = {"sgd": (SGD, {"momentum": 0.8}), "adamw": (AdamW, {"weight_decay": 0.1})}[optimizer]
    steps = grouped(model, kind, lr=0.05, **more)
    method = assay.InRunShapley(targets(), path, memory=memory, **options)
    with assay.Run(model, steps, methods=[method]) as run:
        for step in range(6):
            for micro in range(2):
                first = 6 * step + 3 * micro
                with run.step([first, first + 1, first + 2]):
                    (loss_fn(model, batch(3, 10 * step + micro)) / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            steps.step()
            steps.zero_grad()
    return run


@pytest.mark.parametrize("path", ["trapezoid", "simpson"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rounding_errs_in_the_division_only(optimizer: str, path: str) -> None:
    exact, rounded = (single(optimizer, path, memory).ledger for memory in ("keep", "reduced"))
    left = single(optimizer, "left", "keep").ledger
    for name in targets():
        steps = [ledger.steps(name).sort("step", "id") for ledger in (exact, rounded, left)]
        truth, found, first = (frame["value"] for frame in steps)
        correction = (truth - first).abs().max()
        assert isinstance(correction, float)
        error = (truth - found).abs().max()
        assert isinstance(error, float)
        assert 0 < error < 0.01 * correction  # bfloat16 has 8 digits: 0.004
        for a, b in zip(exact.account(name)["predicted"], rounded.account(name)["predicted"], strict=True):
            assert abs(a - b) < 2e-5 * correction  # float32's own rounding
        for line in ("carried", "decayed", "actual"):
            assert exact.account(name)[line].equals(rounded.account(name)[line])


def test_rounded_gradients_take_half_the_memory() -> None:
    from assay.capture.factors import Outer
    from assay.capture.layout import Layout
    from assay.capture.rounding import Rounded, rounded

    pair = Outer(torch.randn(3, 5, 4), torch.randn(3, 5, 2), Layout(0, 3))
    low = rounded(pair)
    assert isinstance(low, Rounded)
    assert isinstance(low.factors, Outer)
    assert (low.factors.a.element_size(), low.factors.b.element_size()) == (2, 2)
    G = torch.randn(2, 2, 4)
    torch.testing.assert_close(low.dot(G), pair.dot(G), rtol=0.02, atol=0.1)
    assert rounded(low) is low
    double = Outer(pair.a.double(), pair.b.double(), pair.layout)
    assert rounded(double) is double


def test_sketched_momentum_is_taken_before_rounding() -> None:
    exact, rounded = (
        single("adamw", "trapezoid", memory, momentum="sketch").ledger.account("loss")
        for memory in ("keep", "reduced")
    )
    assert (exact["predicted"] - rounded["predicted"]).abs().max() < 1e-6  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "none"}, "memory='none'.*'keep', 'reduced', 'recompute'"),
        ({"memory": "reduced"}, "memory='reduced'.*needs path='trapezoid' or path='simpson'"),
        ({"memory": "reduced", "path": "simpson", "momentum": "exact"}, "needs momentum='instant' or"),
        ({"memory": "recompute", "momentum": "sketch"}, "needs momentum='instant'"),
        ({"memory": "recompute", "granularity": "token"}, "needs granularity='sample'"),
    ],
)
def test_choices_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(assay.errors.InputError, match=message):
        assay.InRunShapley(targets(), **options)


# --- let go of


@pytest.mark.parametrize(
    ("path", "memory"), [("left", "keep"), ("trapezoid", "keep"), ("trapezoid", "reduced")]
)
def test_gradients_do_not_outlive_their_values(
    path: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freed when the step is valued, without waiting for the collection of garbage."""
    seen: list[list[weakref.ref[Tensor]]] = []
    take = Capture.release

    def watched(capture: Capture) -> Any:
        kept = take(capture)
        held = [x for _, factors in kept for x in vars(factors).values() if isinstance(x, Tensor)]
        seen.append([weakref.ref(x) for x in held])
        return kept

    monkeypatch.setattr(Capture, "release", watched)
    model = net().float()
    optimizer = OPTIMIZERS["adamw"](model)
    method = assay.InRunShapley(targets(), path, memory=memory)
    gc.disable()
    try:
        run = assay.Run(model, optimizer, methods=[method])
        for step in range(3):
            with run.step([0, 1, 2]):
                assert not any(ref() is not None for refs in seen for ref in refs)
                loss_fn(model, batch(3, step)).backward()
            assert seen[step]
            optimizer.step()
            optimizer.zero_grad()
    finally:
        gc.enable()
    run.close()


# --- the target's gradient


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_gradient_of_the_target_at_a_time(optimizer: str) -> None:
    """It is as large as the model: that of the last step is gone before that of the next is taken."""
    model = net()
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watching(m: nn.Module, data: Any) -> Tensor:
        alive.append(sum(ref() is not None for ref in held))
        return loss_fn(m, data)

    opt = OPTIMIZERS[optimizer](model)
    method = assay.InRunShapley(assay.Target([batch(2, 900)], watching))
    with assay.Run(model, opt, methods=[method], check="off") as run:
        for number in range(4):
            with run.step(range(3)):
                loss_fn(model, batch(3, number)).backward()
            opt.step()
            opt.zero_grad()
            held[:] = [weakref.ref(g) for g in run._sessions[0].left.values()]  # type: ignore[attr-defined]
            assert held
    assert alive[:4] == [0, 0, 0, 0]
