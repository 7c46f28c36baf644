"""The forms of a target's gradient: exact ones against the gradient as autograd gives it, bfloat16 against rounded."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from methods.slow import (
    OPTIMIZERS,
    Weights,
    batch,
    dot,
    gradient_at,
    loss_fn,
    margin,
    net,
    row,
    times,
    train,
    values_of,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import assay
from assay.capture import factored, pairs
from assay.capture.factored import Factored, FactoredPass
from assay.capture.held import Held, Joined, Low
from assay.capture.host import OnHost
from assay.errors import AssayWarning, InputError
from assay.methods.session import InRunSession
from assay.targets import TargetPass

LINES = ("predicted", "carried", "decayed", "actual", "residual")


def targets() -> dict[str, assay.Target]:
    return {
        "loss": assay.Target([batch(4, 900), batch(2, 901)], loss_fn),
        "margin": assay.Target([batch(3, 902)], margin),
    }


@pytest.fixture
def always_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs even where they are larger than the gradient: the test's layers are small."""
    monkeypatch.setattr(factored, "_smaller", lambda *_: True)


def assert_same(a: assay.Run, b: assay.Run, rtol: float = 1e-11) -> None:
    for name in targets():
        full, other = a.ledger.steps(name), b.ledger.steps(name)
        assert full["id"].equals(other["id"])
        scale = full["value"].abs().max()
        assert isinstance(scale, float)
        assert (full["value"] - other["value"]).abs().max() <= rtol * scale  # type: ignore[operator]
        for line in LINES:
            x, y = a.ledger.account(name)[line], b.ledger.account(name)[line]
            assert (x - y).abs().max() <= rtol * max(scale, x.abs().max())  # type: ignore[type-var, operator]


CASES: dict[str, dict[str, Any]] = {
    "left": {},
    "trapezoid": {"path": "trapezoid"},
    "simpson": {"path": "simpson"},
    "hessian": {"path": "hessian"},
    "tolerance": {"path": "trapezoid", "tolerance": 1e-9, "max_points": 9},
    "refresh": {"refresh": 2},
    "tokens": {"granularity": "token", "path": "trapezoid"},
    "recompute": {"memory": "recompute"},
    "recompute at the right end": {"memory": "recompute", "path": "simpson"},
    "exact momentum": {"momentum": "exact", "path": "trapezoid"},
    "sketched momentum": {"momentum": "sketch", "path": "trapezoid", "sketch": 61},
}


@pytest.mark.usefixtures("always_factors")
@pytest.mark.parametrize("form", ["cpu", "factors"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("case", CASES)
def test_exact_forms_give_the_values_of_the_full_one(case: str, optimizer: str, form: str) -> None:
    """Parameter groups, two targets, two micro-batches, clipping, a weight computed from another."""
    if form == "factors" and case == "hessian":
        pytest.skip("refused")
    assert_same(of_case(case, optimizer, "full"), of_case(case, optimizer, form))


@cache
def of_case(case: str, optimizer: str, form: str) -> assay.Run:
    build = OPTIMIZERS[optimizer]
    options = {**CASES[case], "target_gradient": form}
    return train(build, targets(), steps=3, sizes=(3, 2), clip=0.05, **options)[0]


@pytest.mark.usefixtures("always_factors")
@pytest.mark.parametrize("form", ["cpu", "factors"])
@pytest.mark.parametrize("optimizer", ["nesterov_l2", "damped", "maximize", "rmsprop", "adafactor"])
def test_other_optimizers(optimizer: str, form: str) -> None:
    runs = [
        train(OPTIMIZERS[optimizer], targets(), steps=3, target_gradient=chosen)[0]
        for chosen in ("full", form)
    ]
    assert_same(*runs)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adafactor"])
def test_bfloat16_is_the_rounded_gradient_and_nothing_else(optimizer: str) -> None:
    """Values and account by the definition, with every entry of ∇ℓ rounded once."""
    run, moments, _ = train(
        OPTIMIZERS[optimizer], targets(), sizes=(3, 2), clip=0.05, target_gradient="bfloat16"
    )
    for name, target in targets().items():
        for step, moment in enumerate(moments):
            exact = gradient_at(moment.before, target)
            gradient: Weights = {k: g.bfloat16().double() for k, g in exact.items()}
            total = 0.0
            for (i, value), (j, g) in zip(values_of(run, step, name), moment.samples, strict=True):
                assert i == j
                assert value == pytest.approx(dot(gradient, times(moment.gain, g)), rel=1e-9, abs=1e-14)
                total += value
            found = row(run, step, name)
            assert found["predicted"] == pytest.approx(total, rel=1e-9, abs=1e-14)
            assert found["carried"] == pytest.approx(dot(gradient, moment.carried), rel=1e-9, abs=1e-14)
            assert found["decayed"] == pytest.approx(dot(gradient, moment.decayed), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("path", ["left", "trapezoid", "simpson", "hessian"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_bfloat16_stays_near(path: str, optimizer: str) -> None:
    full, low = (
        train(OPTIMIZERS[optimizer], targets(), sizes=(3, 2), path=path, target_gradient=form)[0]
        for form in ("full", "bfloat16")
    )
    for name in targets():
        a, b = full.ledger.steps(name)["value"], low.ledger.steps(name)["value"]
        apart, size = (a - b).to_torch().norm(), a.to_torch().norm()
        assert 0 < apart < 2**-7 * size


# --- models


class Tied(nn.Module):
    """An embedding that is the head as well, positions broadcast over the batch, a checkpoint, an expert per row."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.place = nn.Parameter(torch.randn(1, 4, 6))
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place  # [B, 4, 6]
        h = checkpoint(
            lambda h: h + self.last(F.dropout(torch.tanh(self.first(h)), 0.3, self.training)),
            h,
            use_reentrant=self.reentrant,
        )
        flat = h.flatten(0, 1)
        chosen = x.flatten() % 2
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(flat[rows]))
        return (h + out.view_as(h)) @ self.embed.weight.t()


def next_token(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten())


def trained(
    form: str,
    make: Callable[[], nn.Module],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    path: str = "left",
    check: str = "first",
) -> tuple[assay.Run, list[Tensor]]:
    torch.manual_seed(0)
    model = make()
    steps = optimizer(model.parameters())
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(12, (5, 3, 4), generator=generator)
    held_out = torch.randint(12, (2, 2, 4), generator=generator)
    named = {"loss": assay.Target(list(held_out), next_token), "margin": assay.Target([data[4]], next_token)}
    method = assay.InRunShapley(named, path, target_gradient=form)
    with assay.Run(model, steps, methods=[method], check=check) as run:
        for step in range(3):
            with run.step([3 * step, 3 * step + 1, 3 * step + 2]):
                next_token(model, data[step]).backward()
            steps.step()
            steps.zero_grad()
    return run, [p.detach().clone() for p in model.parameters()]


@pytest.mark.usefixtures("always_factors")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["cpu", "factors"])
@pytest.mark.parametrize("build", [lambda p: SGD(p, 0.1), lambda p: AdamW(p, 0.01)], ids=["sgd", "adamw"])
def test_tied_weights_checkpoints_and_experts(build: Any, form: str, reentrant: bool) -> None:
    full, other = (
        trained(chosen, lambda: Tied(reentrant).double(), build, "trapezoid" if reentrant else "left")
        for chosen in ("full", form)
    )
    assert_same(full[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(full[1], other[1], strict=True))  # training is not disturbed


@pytest.mark.usefixtures("always_factors")
@pytest.mark.parametrize("kept", [True, False])
def test_factors_meet_factors(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """SGD, where K is a number: directions of layers in pairs are not written out where the values ride."""
    monkeypatch.setattr(pairs, "are_cheaper", lambda *_: True)
    path = "trapezoid" if kept else "left"
    full, _ = trained("full", lambda: Tied().double(), lambda p: SGD(p, 0.1), path, check="off")
    written: list[bool] = []
    met: list[int] = []
    plain, products = Factored.__getitem__, pairs.products

    def read(self: Factored, param: nn.Parameter) -> Tensor:
        written.append(self.pairs(param) is not None)
        return plain(self, param)

    def counted(*args: Any) -> Tensor:
        met.append(1)
        return products(*args)

    monkeypatch.setattr(Factored, "__getitem__", read)
    monkeypatch.setattr(pairs, "products", counted)
    run, _ = trained("factors", lambda: Tied().double(), lambda p: SGD(p, 0.1), path, check="off")
    assert_same(full, run)
    assert met
    assert written  # biases and positions, and small layers of which every sample's gradient is kept
    assert any(written) == kept


def test_a_use_without_a_pair_is_noticed_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is squared every now and then: from the first time on it is taken from autograd."""
    monkeypatch.setattr(factored, "_smaller", lambda *_: True)

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.passes = nn.Linear(6, 12), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += not self.training
            w = self.layer.weight
            if not self.training and self.passes > 9:
                w = w.square()
            return F.linear(F.one_hot(x, 6).to(w.dtype), w, self.layer.bias)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x % 6).flatten(0, 1), x.flatten())

    seen = []
    choose = FactoredPass._choose

    def noted(self: FactoredPass) -> None:
        choose(self)
        seen.append(self)

    monkeypatch.setattr(FactoredPass, "_choose", noted)
    runs = []
    for form in ("full", "factors"):
        torch.manual_seed(0)
        model = Moody().double()
        model.passes = 4 if form == "full" else 0  # which makes no pass to choose by, nor one to take again
        optimizer = SGD(model.parameters(), 0.1)
        x = torch.randint(12, (4, 3, 4), generator=torch.Generator().manual_seed(2))
        target = assay.Target([x[3]], loss)
        with assay.Run(
            model,
            optimizer,
            methods=[assay.InRunShapley({"loss": target, "margin": target}, target_gradient=form)],
            check="off",
        ) as run:
            for step in range(6):
                with run.step([0, 1, 2]):
                    loss(model, x[step % 3]).backward()
                optimizer.step()
                optimizer.zero_grad()
                if form == "factors" and step == 2:
                    assert [p is model.layer.weight for p in seen[0]._chosen] == [True]
        runs.append(run)
    assert not seen[0]._chosen
    for name in targets():
        for run in runs:
            assert run.ledger.steps(name).height == 18


@pytest.mark.parametrize("form", ["bfloat16", "cpu", "factors"])
def test_under_autocast_and_gradients_in_bfloat16(form: str) -> None:
    """The forms agree as far as bfloat16 reaches, and the loss of the account is the same."""
    for kind in ("autocast", "bfloat16"):
        found = []
        for chosen in ("full", form):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 12))
            model = model.bfloat16() if kind == "bfloat16" else model
            optimizer = AdamW(model.parameters(), 0.01)
            x = torch.randn(5, 3, 24).to(next(model.parameters()).dtype)

            def loss(model: nn.Module, x: Tensor, kind: str = kind) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                    return F.cross_entropy(model(x).float(), torch.tensor([1, 2, 3])[: len(x)])

            with assay.Run(
                model,
                optimizer,
                methods=[assay.InRunShapley(assay.Target([x[4, :2]], loss), target_gradient=chosen)],
            ) as run:
                for step in range(4):
                    with run.step([0, 1, 2]):
                        loss(model, x[step]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            found.append(run.ledger.steps()["value"].to_torch())
        assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()


# --- what is held


def held_in(form: str, model: nn.Module, batches: list[Any], loss: Any) -> Held:
    """∇ℓ of one target as a session holds it."""
    method = assay.InRunShapley(assay.Target(batches, loss), target_gradient=form)
    run = assay.Run(model, SGD(model.parameters(), 0.1), methods=[method])
    (session,) = run._sessions
    assert isinstance(session, InRunSession)
    session.begin_step(0)
    assert isinstance(session.left, Held)
    return session.left


def test_memory_of_each_form() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 10))
    full = sum(p.nbytes for p in model.parameters())
    x = torch.randint(100, (1, 5))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), x.flatten() % 10)

    low = held_in("bfloat16", model, [x], loss)
    assert isinstance(low, Low)
    assert low.bytes() == full / 2
    assert isinstance(held_in("cpu", model, [x], loss), OnHost)
    few = held_in("factors", model, [x], loss)
    biases = 4 * (200 + 10)
    activations = 5 * (8 + 4 * 64 + 4 * 200) + 5 * (4 * 64 + 4 * 200) + 5 * 4 * 10
    assert few.bytes() <= biases + activations < full / 4
    found = torch.autograd.grad(loss(model, x), list(model.parameters()))
    for p, g in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(few[p][0], g)


def test_the_full_gradient_is_gone_when_it_was_rounded() -> None:
    """Nobody else holds what `Low` has taken over, not even the pass that waits to take the next target."""
    model = net()
    for _, gradient in TargetPass(model, targets(), list(model.parameters())).pieces():
        taken = [weakref.ref(g) for g in gradient.values()]
        Low(gradient)
        assert all(ref() is None for ref in taken)


def test_factors_larger_than_the_gradient_are_not_kept() -> None:
    model = net().float()
    with pytest.warns(AssayWarning, match=r"target_gradient='factors'.*held written out.*'bfloat16'"):
        few = held_in("factors", model, [batch(64, 1)], loss_fn)
    assert few.bytes() == sum(p.nbytes for p in model.parameters())


def test_several_targets_are_held_one_by_one() -> None:
    model = net()
    method = assay.InRunShapley(targets(), target_gradient="bfloat16")
    run = assay.Run(model, SGD(model.parameters(), 0.1), methods=[method])
    (session,) = run._sessions
    assert isinstance(session, InRunSession)
    session.begin_step(0)
    assert isinstance(session.left, Joined)
    assert session.left.targets == 2
    assert {p: g.shape for p, g in session.left.items()} == {p: (2, *p.shape) for p in model.parameters()}


# --- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_gradient": "half"}, "target_gradient='half'.*'full', 'bfloat16', 'cpu', 'factors'"),
        ({"target_gradient": "factors", "path": "hessian"}, "no factors.*path='trapezoid'.*'bfloat16'"),
    ],
)
def test_choices_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assay.InRunShapley(targets(), **options)


def test_a_target_without_a_gradient_is_refused_in_every_form() -> None:
    model = net()
    target = assay.Target([batch(2, 1)], lambda m, b: torch.tensor(1.0))
    for form in ("full", "bfloat16", "cpu", "factors"):
        run = assay.Run(
            model, SGD(model.parameters(), 0.1), methods=[assay.InRunShapley(target, target_gradient=form)]
        )
        with pytest.raises(InputError, match="does not depend on the model's parameters"), run.step([0]):
            pass


def test_the_choice_is_on_record() -> None:
    run, _, _ = train(OPTIMIZERS["sgd"], targets(), steps=1, target_gradient="bfloat16")
    (described,) = run.ledger.info["methods"]
    assert described["target_gradient"] == "bfloat16"
