"""``w_t − w_{t+1} = lr·gain·grad + carried + decayed`` against the optimizers' true steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizers.cases import FUSED, OPTIONS, TABLE, Case, gradients, values
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from assay.optimizers import OptimizerModel, model_of
from assay.optimizers.pieces import pieces

LOOPS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
FORMS = [
    (name, loop) for name, case in TABLE.items() for loop in LOOPS if loop != "fused" or case.kind in FUSED
]
TENSOR_LR = [(kind, shape) for kind in OPTIONS for shape in ((), (1,)) if kind is not SGD or not shape]


def assert_step_is_the_split(
    model: OptimizerModel, params: list[Parameter], step: Any, tolerance: float = 1e-12
) -> None:
    """Split every parameter's step, take it, and compare."""
    before, grads = values(params), [None if p.grad is None else p.grad.clone() for p in params]
    rates = [torch.as_tensor(model.lr(model.group_index(p)), dtype=torch.float64).clone() for p in params]
    splits = [model.split(p) for p in params]
    step()
    for w, g, lr, split, p in zip(before, grads, rates, splits, params, strict=True):
        predicted = lr * split.gain * (torch.zeros_like(w) if g is None else g)
        predicted = predicted + split.carried + split.decayed
        torch.testing.assert_close(
            predicted.expand_as(w), w - p.detach(), rtol=tolerance, atol=tolerance, check_dtype=False
        )


@pytest.mark.parametrize("entries", [1, 4, 100])
@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.kind is not Adafactor])
def test_pieces_put_together_are_the_split(name: str, entries: int) -> None:
    params, optimizer = TABLE[name].build()
    model = model_of(optimizer)
    assert model.elementwise
    for _ in gradients(params, steps=3):
        moving = [param for param in params if param.grad is not None]
        covered = dict.fromkeys(moving, 0)
        for piece in pieces(model, moving, entries):
            assert sum(part.stop - part.start for _, part in piece.where) <= max(entries, 1)
            found = piece.parts.written()
            at = 0
            for param, part in piece.where:
                whole, size = model.split(param), part.stop - part.start
                for field in ("gain", "carried", "decayed"):
                    expected = torch.as_tensor(getattr(whole, field), dtype=param.dtype).expand_as(param)
                    own = torch.as_tensor(getattr(found, field), dtype=param.dtype)
                    own = own[at : at + size] if own.dim() and len(own) > 1 else own.expand(size)
                    torch.testing.assert_close(own, expected.flatten()[part], rtol=1e-13, atol=1e-16)
                covered[param] += size
                at += size
        assert covered == {param: param.numel() for param in moving}
        optimizer.step()


def test_small_parameters_of_a_group_are_read_at_once() -> None:
    params = [Parameter(torch.ones(n)) for n in (3, 4, 5)]
    late, scalar = Parameter(torch.ones(2)), Parameter(torch.tensor(1.0))
    optimizer = Adam([{"params": [*params, late, scalar]}])
    for number in range(3):
        for param in (*params, scalar, *([late] if number else [])):
            param.grad = torch.ones_like(param)
        if number == 2:
            break
        optimizer.step()
    moving = [*params, late, scalar]  # `late` has taken a step less: its bias correction is another
    found = [[len(p.flatten()) for p, _ in piece.where] for piece in pieces(model_of(optimizer), moving, 9)]
    assert sorted(found) == [[1], [2], [3, 4], [5]]


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "loop"), FORMS)
def test_every_step_is_the_split(
    name: str, loop: str, default_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TABLE[name]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype)  # the dtype of the step counts and of NAdam's product
    try:
        params, optimizer = case.build(**LOOPS[loop])
        schedule = LambdaLR(optimizer, lambda step: [1.0, 0.7, 0.0, 0.4][step % 4])
        model = model_of(optimizer)
        for _ in gradients(params, steps=8):
            assert_step_is_the_split(model, params, optimizer.step)
            schedule.step()
    finally:
        torch.set_default_dtype(previous)


def test_momentum_and_decay_are_not_empty() -> None:
    """The parts that the table adds up are really there."""
    for kind, options in ((SGD, {"momentum": 0.9}), (Adam, {}), (AdamW, {}), (NAdam, {}), (RAdam, {})):
        case = Case(kind, {"lr": 0.1, "weight_decay": 0.1, **options})
        params, optimizer = case.build()
        model = model_of(optimizer)
        for step in gradients(params, steps=2, missing=False):
            split = model.split(params[0])
            assert torch.as_tensor(split.decayed).abs().min() > 0
            assert (torch.as_tensor(split.carried).abs().max() > 0) == (step > 0)
            optimizer.step()


def test_decoupled_decay_is_lr_times_decay_times_weight() -> None:
    w = Parameter(torch.tensor([2.0, -4.0]))
    split = model_of(AdamW([w], lr=0.1, weight_decay=0.5)).split(w, torch.ones(2))
    torch.testing.assert_close(split.decayed, torch.tensor([0.1, -0.2]))


@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop], ids=lambda kind: kind.__name__)
def test_cycled_momentum(kind: type[Optimizer]) -> None:
    options = {} if kind is Adam else {"momentum": 0.9}
    params, optimizer = Case(kind, {"lr": 0.05, **options}).build()
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=8, base_momentum=0.5, max_momentum=0.9)
    model = model_of(optimizer)
    for _ in gradients(params, steps=8):
        assert_step_is_the_split(model, params, optimizer.step)
        schedule.step()


@pytest.mark.parametrize(("kind", "shape"), TENSOR_LR)  # torch's SGD takes no tensor lr with a dimension
def test_tensor_lr(kind: type[Optimizer], shape: tuple[int, ...]) -> None:
    options = {"momentum": 0.9} if kind in (SGD, RMSprop) else {}
    lr = torch.full(shape, 0.05, dtype=torch.float64)
    params, optimizer = Case(kind, {"lr": lr, "weight_decay": 0.1, "foreach": False, **options}).build()
    model = model_of(optimizer)
    for _ in gradients(params, steps=4):
        assert_step_is_the_split(model, params, optimizer.step)
        lr.mul_(0.5)
    got = model.lr(0)
    assert isinstance(got, torch.Tensor)
    assert got.shape == ()


def test_tensor_betas() -> None:
    betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in (0.9, 0.95))
    params, optimizer = Case(AdamW, {"lr": 0.05, "betas": betas, "foreach": False}).build()
    model = model_of(optimizer)
    for _ in gradients(params, steps=4):
        assert_step_is_the_split(model, params, optimizer.step, tolerance=1e-7)  # torch's powers are float32


def test_restored_state_and_late_group() -> None:
    case = TABLE["AdamW-amsgrad"]
    params, optimizer = case.build()
    for _ in gradients(params, steps=3):
        optimizer.step()
    fresh = case.kind([{"params": params[:2]}, {"params": params[2:], **case.second}], **case.options)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model = model_of(fresh)
    late = Parameter(torch.randn(3, dtype=torch.float64))
    assert len(model.params()) == 4
    assert model.group_index(params[0]) == 0
    fresh.add_param_group({"params": [late], "lr": 0.7})
    params.append(late)
    assert model.params() == params
    assert [model.group_index(p) for p in params] == [0, 0, 1, 1, 2]
    for _ in gradients(params, steps=2):
        assert_step_is_the_split(model, params, fresh.step)


@pytest.mark.parametrize("name", TABLE)
def test_state_is_left_alone(name: str) -> None:
    params, optimizer = TABLE[name].build()
    model = model_of(optimizer)
    for _ in gradients(params, steps=2, missing=False):
        before = {p: dict(optimizer.state[p]) for p in params if p in optimizer.state}
        tensors = [*params, *(p.grad for p in params if p.grad is not None)]
        tensors += [x for state in before.values() for x in state.values() if isinstance(x, torch.Tensor)]
        copies, versions = [x.detach().clone() for x in tensors], [x._version for x in tensors]
        for p in params:
            model.split(p)
            model.split(p, torch.ones_like(p))
            model.previous_gain(p)
        assert [x._version for x in tensors] == versions
        assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
        after = {p: dict(state) for p, state in optimizer.state.items()}
        assert after.keys() == before.keys()
        assert all(after[p].keys() == before[p].keys() for p in after)
        optimizer.step()


def test_given_gradient_takes_the_place_of_the_stored_one() -> None:
    params, optimizer = TABLE["Adam-decay"].build()
    model = model_of(optimizer)
    for _ in gradients(params, steps=2, missing=False):
        handed, params[0].grad = params[0].grad, None
        given_split = model.split(params[0], handed)
        params[0].grad = handed
        assert torch.equal(torch.as_tensor(given_split.gain), torch.as_tensor(model.split(params[0]).gain))
        optimizer.step()


def test_without_a_gradient_nothing_moves() -> None:
    w = Parameter(torch.ones(2))
    split = model_of(AdamW([w])).split(w)
    assert (split.gain, split.carried, split.decayed) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_widened(kind: type[Optimizer], dtype: torch.dtype) -> None:
    """The same weights, gradients and state in float64 give the same parts up to float32's rounding."""
    eps = {} if kind is SGD else {"eps": (1e-3, 1e-3) if kind is Adafactor else 1e-3}
    options = {"momentum": 0.9} if kind in (SGD, RMSprop) else {}
    case = Case(kind, {"lr": 0.05, "weight_decay": 0.1, "foreach": False, **eps, **options})
    params, optimizer = case.build(dtype)
    exact, reference = case.build()
    for _ in gradients(params, steps=3, missing=False):
        for p, q in zip(params, exact, strict=True):
            q.data, q.grad = p.detach().double(), p.grad.double()
            state = optimizer.state.get(p, {})
            reference.state[q] = {k: x.double() if x.dtype == dtype else x for k, x in state.items()}
        for p, q in zip(params, exact, strict=True):
            low, high = model_of(optimizer).split(p), model_of(reference).split(q)
            for part in ("gain", "carried", "decayed"):
                a, b = torch.as_tensor(getattr(low, part)), torch.as_tensor(getattr(high, part))
                assert a.dtype in (torch.float32, torch.float64)
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-7)
        optimizer.step()


def test_adafactor_takes_eps_from_the_first_dtype_of_a_group() -> None:
    params = [Parameter(0.1 * torch.randn(3, 4, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = Adafactor(params, lr=0.05, foreach=False)
    model = model_of(optimizer)
    for _ in range(3):
        for p in params:
            p.grad = 1e-7 * torch.randn_like(p)  # below float32's eps, where it decides the step
        assert_step_is_the_split(model, params[1:], optimizer.step)


unit = st.floats(0.0, 0.99, allow_subnormal=False)
decays = st.sampled_from([0.0, 0.01, 0.5])
common = {"lr": st.floats(0.0, 1.0, allow_subnormal=False), "weight_decay": decays, "maximize": st.booleans()}
betas = st.tuples(unit, st.floats(0.1, 0.9999))
adam = {**common, "betas": betas, "eps": st.sampled_from([1e-8, 1e-3])}
STRATEGIES: dict[type[Optimizer], dict[str, st.SearchStrategy[Any]]] = {
    SGD: {**common, "momentum": unit, "dampening": unit, "nesterov": st.booleans()},
    Adam: {**adam, "amsgrad": st.booleans()},
    AdamW: {**adam, "amsgrad": st.booleans()},
    NAdam: {**adam, "momentum_decay": st.floats(0.0, 1.0), "decoupled_weight_decay": st.booleans()},
    RAdam: {**adam, "decoupled_weight_decay": st.booleans()},
    Adagrad: {**common, "lr_decay": unit, "initial_accumulator_value": st.sampled_from([0.0, 0.5])},
    RMSprop: {**common, "alpha": st.floats(0.1, 0.99), "momentum": unit, "centered": st.booleans()},
    Adafactor: {**common, "beta2_decay": st.floats(-1.0, 0.0), "d": st.floats(1.0, 10.0)},
}


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.__name__)
def test_any_options(kind: type[Optimizer]) -> None:
    @given(st.fixed_dictionaries(STRATEGIES[kind]), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
    def check(options: dict[str, Any], steps: int, seed: int, foreach: bool) -> None:
        if options.get("nesterov"):
            options = {**options, "dampening": 0.0, "momentum": max(options["momentum"], 0.01)}
        torch.manual_seed(seed)
        params, optimizer = Case(kind, {**options, "foreach": foreach}).build()
        model = model_of(optimizer)
        for _ in gradients(params, steps):
            assert_step_is_the_split(model, params, optimizer.step, tolerance=1e-10)

    check()
