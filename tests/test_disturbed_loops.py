"""What loops do beside forward, backward and step: throw gradients away or change them, freeze and unfreeze."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import assay

STEPS, BATCH, LR = 5, 4, 0.1
Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (BATCH,), generator=generator)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def ids(step: int) -> list[int]:
    return list(range(step * BATCH, (step + 1) * BATCH))


class Loop:
    """Trains a small network, and measures ⟨∇ℓ, w_t − w_{t+1}⟩ of each step beside the run."""

    def __init__(self, build: Callable[[nn.Module], Optimizer], **settings: Any) -> None:
        self.model = network()
        self.optimizer = build(self.model)
        self.target = batch(99)
        self.methods = [assay.InRunShapley({"t": assay.Target([self.target], loss_fn)}, **settings)]
        self.run = assay.Run(self.model, self.optimizer, methods=self.methods)
        self.moved: list[float] = []

    def step(
        self, number: int, change: Callable[[], object] = lambda: None, set_to_none: bool = True
    ) -> None:
        params = list(self.model.parameters())
        slopes = torch.autograd.grad(loss_fn(self.model, self.target), [p for p in params if p.requires_grad])
        before = [p.detach().clone() for p in params if p.requires_grad]
        trained = [p for p in params if p.requires_grad]
        with self.run.step(ids(number)):
            backward(loss_fn(self.model, batch(number)))
        change()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none)
        moves = zip(slopes, before, trained, strict=True)
        self.moved.append(sum(float((g * (w - p.detach())).sum()) for g, w, p in moves))

    def predicted(self) -> list[float]:
        self.run.close()
        account = self.run.ledger.account("t").sort("step")
        moved: list[float] = (account["predicted"] + account["carried"] + account["decayed"]).to_list()
        return moved


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=LR)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=LR, eps=1e-3)


# --- gradients that are changed before the step ---


@pytest.mark.parametrize("build", [sgd, adamw])
def test_ascent_has_the_opposite_sign(build: Callable[[nn.Module], Optimizer]) -> None:
    loop = Loop(build)
    for number in range(STEPS):
        loop.step(number, lambda: [p.grad.neg_() for p in loop.model.parameters() if p.grad is not None])
    assert loop.predicted() == pytest.approx(loop.moved, rel=1e-9)


def test_each_group_has_a_sign_of_its_own() -> None:
    def build(model: nn.Module) -> Optimizer:
        first, last = (model.get_submodule(name).parameters() for name in ("0", "2"))
        return SGD([{"params": first}, {"params": last, "lr": 0.03}], lr=LR)

    loop = Loop(build)
    for number in range(STEPS):
        loop.step(
            number, lambda: [p.grad.mul_(-0.5) for p in loop.model[2].parameters() if p.grad is not None]
        )
    assert loop.predicted() == pytest.approx(loop.moved, rel=1e-9)


def test_a_change_that_keeps_the_norm_is_told() -> None:
    loop = Loop(sgd)

    def turn() -> None:
        weight = loop.model.get_parameter("0.weight")
        assert weight.grad is not None
        weight.grad.copy_(weight.grad.flip(0))

    loop.step(0, turn)
    with pytest.warns(assay.AssayWarning, match="more than one factor per parameter group"):
        loop.run.close()


def test_a_hook_that_came_after_the_run_has_clipped() -> None:
    loop = Loop(sgd)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(loop.model.parameters(), 0.01)

    loop.optimizer.register_step_pre_hook(clip)
    for number in range(STEPS):
        loop.step(number)
    assert loop.predicted() == pytest.approx(loop.moved, rel=1e-9)


def test_gradients_changed_between_micro_batches_are_told() -> None:
    loop = Loop(sgd)
    with loop.run.step(ids(0)):
        backward(loss_fn(loop.model, batch(0)))
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.01)
    with (
        pytest.warns(assay.AssayWarning, match="changed between two micro-batches of one optimizer step"),
        loop.run.step(ids(1)),
    ):
        backward(loss_fn(loop.model, batch(1)))
    loop.optimizer.step()
    loop.run.close()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("path", ["left", "trapezoid"])
def test_gradients_zeroed_at_the_beginning_of_a_block(path: str, set_to_none: bool) -> None:
    """What an earlier block left for a step that was passed over is nobody's."""
    found = []
    for passed_over in (True, False):
        loop = Loop(adamw, path=path)
        for number in range(STEPS):
            if number == 2 and not passed_over:
                continue
            with loop.run.step(ids(number)):
                loop.optimizer.zero_grad(set_to_none)
                backward(loss_fn(loop.model, batch(number)))
            if number != 2:
                loop.optimizer.step()
        loop.run.close()
        found.append(loop.run.ledger.values("t").sort("id"))
    assert not set(found[0]["id"]) & set(ids(2))
    assert found[0]["id"].to_list() == found[1]["id"].to_list()
    assert found[0]["value"].to_list() == pytest.approx(found[1]["value"].to_list(), rel=1e-9)


# --- who is trained ---


@pytest.mark.parametrize("path", ["left", "trapezoid"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("build", [sgd, adamw])
def test_frozen_in_the_middle(build: Callable[[nn.Module], Optimizer], set_to_none: bool, path: str) -> None:
    """The values of a layer end where it is frozen, and training does not."""
    loop = Loop(build, path=path)
    for number in range(STEPS):
        if number == 2:
            loop.model[0].requires_grad_(False)
            if build is adamw:
                loop.model[0].zero_grad()  # else its momentum goes on
        loop.step(number, set_to_none=set_to_none)
    found = loop.predicted()
    if path == "left":
        assert found == pytest.approx(loop.moved, rel=1e-9)
    assert [p.requires_grad for p in loop.model.parameters()] == [False, False, True, True]
    assert len(found) == STEPS


@pytest.mark.parametrize("how", ["requires_grad_", "add_param_group"])
def test_trained_later_is_told_and_valued_by_a_new_run(how: str) -> None:
    def build(model: nn.Module) -> Optimizer:
        model.get_submodule("0").requires_grad_(False)
        return SGD([p for p in model.parameters() if how == "requires_grad_" or p.requires_grad], lr=LR)

    loop = Loop(build)
    loop.step(0)
    loop.model[0].requires_grad_(True)
    if how == "add_param_group":
        loop.optimizer.add_param_group({"params": list(loop.model[0].parameters())})
    with pytest.warns(assay.AssayWarning, match=r"0\.weight, 0\.bias began to be trained after"):
        loop.step(1)
    status = dict(loop.run.coverage().select("parameter", "status").iter_rows())
    assert status == {name: "trained later" if name[0] == "0" else "exact" for name in status}
    assert loop.predicted()[0] == pytest.approx(loop.moved[0], rel=1e-9)
    loop.run = assay.Run(loop.model, loop.optimizer, methods=loop.methods)
    loop.step(2)
    assert loop.predicted()[0] == pytest.approx(loop.moved[2], rel=1e-9)


def test_what_is_excluded_may_be_trained_later() -> None:
    model = network()
    model[0].requires_grad_(False)
    target = assay.Target([batch(99)], loss_fn)
    optimizer = sgd(model)
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley({"t": target})], exclude=["0.*"])
    for number in range(2):
        model[0].requires_grad_(number == 1)
        with run.step(ids(number)):
            backward(loss_fn(model, batch(number)))
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    assert "trained later" not in run.coverage()["status"].to_list()


# --- who steps ---


def test_a_step_inside_of_the_block() -> None:
    model = network()
    optimizer = sgd(model)
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley({"t": assay.Target([batch(99)], loss_fn)})])

    def wrong() -> None:
        with run.step(ids(0)):
            backward(loss_fn(model, batch(0)))
            optimizer.step()

    with pytest.raises(assay.InputError, match=r"optimizer\.step\(\) was called inside"):
        wrong()
    run.close()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_new_optimizer_is_told(set_to_none: bool) -> None:
    loop = Loop(sgd)
    loop.step(0)
    loop.optimizer = SGD(loop.model.parameters(), lr=0.05)
    loop.step(1, set_to_none=set_to_none)
    with pytest.warns(assay.AssayWarning, match="weights have moved all the same"):
        loop.step(2, set_to_none=set_to_none)
    loop.run.close()


def test_the_curve_numbers_steps_as_the_account_does() -> None:
    loop = Loop(sgd)
    loop.run.log({"before": 0.0})
    for number in range(3):
        with loop.run.step(ids(number)):
            backward(loss_fn(loop.model, batch(number)))
            loop.run.log({"inside": 0.0})
        loop.run.log({"open": 0.0})
        loop.optimizer.step()
        loop.run.log({"taken": 0.0})
        loop.optimizer.zero_grad()
    loop.run.close()
    curve = loop.run.ledger.table("curve")
    for name, steps in {"before": [0], "inside": [0, 1, 2], "open": [0, 1, 2], "taken": [0, 1, 2]}.items():
        assert curve.filter(curve[name].is_not_null())["step"].to_list() == steps
    assert loop.run.ledger.account("t")["step"].to_list() == [0, 1, 2]


# --- steps that a loss scaler passes over ---


def scaled(
    build: Callable[[nn.Module], Optimizer], bad: int, **settings: Any
) -> tuple[assay.Ledger, nn.Module]:
    """Seven steps under a GradScaler, of which one overflows."""
    model = network().float()
    optimizer = build(model)
    target = batch(99)
    method = assay.InRunShapley({"t": assay.Target([(target[0].float(), target[1])], loss_fn)}, **settings)
    run = assay.Run(model, optimizer, methods=[method])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for number in range(7):
        x, y = batch(number)
        with run.step(ids(number)):
            loss = scaler.scale(loss_fn(model, (x.float(), y)))
            backward(loss * (float("inf") if number == bad else 1.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    run.close()
    return run.ledger, model


@pytest.mark.parametrize("momentum", ["instant", "exact", "sketch"])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_fused_optimizer_passes_over_an_overflow(kind: type[Optimizer], momentum: str) -> None:
    options: dict[str, Any] = {"momentum": 0.8} if kind is SGD else {"eps": 1e-3}

    def built(fused: bool) -> tuple[assay.Ledger, nn.Module]:
        def build(model: nn.Module) -> Optimizer:
            return kind(model.parameters(), lr=0.05, fused=fused, **options)  # type: ignore[call-arg]

        return scaled(build, bad=3, momentum=momentum, sketch=50_021)

    (plain, weights), (fused, others) = built(False), built(True)
    for a, b in zip(weights.parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert fused.account("t")["status"].to_list() == plain.account("t")["status"].to_list()
    assert fused.account("t")["status"].to_list().count("skipped") == 1
    assert not set(fused.values("t")["id"]) & set(ids(3))
    one, other = (ledger.values("t").sort("id")["value"].to_list() for ledger in (fused, plain))
    assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
