"""assay looks on: the training that it values is the training that would have been without it."""

# mypy: allow-untyped-calls
from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference import CASES, Case, Plan, plan, train
from reference.cases import gpt2
from reference.models import WithDropout
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import assay

STEPS = 20
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    # a bias of attention keys has no gradient but rounding, of which the usual ε = 1e-8 makes steps of size lr
    "adamw": lambda m: AdamW(m.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-5),
}
NAMES = ["gpt2", "llama_tied", "llama_untied", "mlp", "cnn", "gpt", "called_twice", "raw_parameters"]


DROPOUT = {
    "mlp": replace(CASES["mlp"], build=WithDropout),
    "gpt2": replace(CASES["gpt2"], build=lambda: gpt2(dropout=0.1)),
}


class Trained:
    """A training of a case in float32, with assay where `options` are given."""

    def __init__(
        self,
        case: Case,
        optimizer: str,
        data: Plan,
        options: dict[str, Any] | None,
    ) -> None:
        loss = list(case.losses.values())[-1]
        self.model = case.model(torch.float32)
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        held_out = case.batch(3, seed=7, dtype=torch.float32)
        target = assay.Target([held_out], loss)
        methods = [assay.InRunShapley(targets={"held_out": target})]
        run = None
        if options is not None:
            run = assay.Run(self.model, self.optimizer, out=None, methods=methods, **options)
        torch.manual_seed(5)
        train(self.model, self.optimizer, data, loss, clip=1.0, record=run.step if run else None)
        self.random_state = torch.get_rng_state()
        if run:
            run.close()

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]

    def moments(self) -> list[Tensor]:
        state = self.optimizer.state
        return [x for p in self.model.parameters() for x in state[p].values() if isinstance(x, Tensor)]


def largest_relative_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Over all tensors: largest difference over the tensor's own largest entry."""
    assert len(a) == len(b)
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in zip(a, b, strict=True))


def test_the_comparison_sees_a_difference() -> None:
    case = CASES["mlp"]
    a = Trained(case, "adamw", plan(case, STEPS, dtype=torch.float32), None)
    b = Trained(case, "adamw", plan(case, STEPS, (4, 4), dtype=torch.float32), None)
    assert largest_relative_difference(a.weights(), b.weights()) > 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_after_twenty_steps(name: str, optimizer: str) -> None:
    case = CASES[name]
    data = plan(case, STEPS, dtype=torch.float32)
    plain, valued = Trained(case, optimizer, data, None), Trained(case, optimizer, data, {})
    assert largest_relative_difference(valued.weights(), plain.weights()) <= 1e-5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_strict_is_bit_for_bit(name: str, optimizer: str) -> None:
    """Weights, momentum and second moments, with accumulation."""
    case = CASES[name]
    data = plan(case, STEPS, (4, 3), dtype=torch.float32)
    plain = Trained(case, optimizer, data, None)
    valued = Trained(case, optimizer, data, {"strict": True})
    for a, b in zip(valued.weights() + valued.moments(), plain.weights() + plain.moments(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_draws_the_same_masks(name: str, strict: bool) -> None:
    case = DROPOUT[name]
    data = plan(case, STEPS, (4, 3), dtype=torch.float32)
    plain, valued = Trained(case, "adamw", data, None), Trained(case, "adamw", data, {"strict": strict})
    assert torch.equal(plain.random_state, valued.random_state)
    if strict:
        assert all(map(torch.equal, valued.weights(), plain.weights()))
    else:
        assert largest_relative_difference(valued.weights(), plain.weights()) <= 1e-5


@pytest.mark.parametrize("strict", [False, True])
def test_gradients_and_state_at_every_moment(strict: bool) -> None:
    """`.grad` after each micro-batch and the optimizer's state after each step are plain training's."""
    case = CASES["gpt"]
    loss = case.losses["token_mean"]
    data = plan(case, 3, (4, 3))

    def history(with_assay: bool) -> list[Tensor]:
        model = case.model()
        opt = OPTIMIZERS["adamw"](model)
        target = assay.Target([case.batch(2, seed=7)], loss)
        methods = [assay.InRunShapley(targets={"held_out": target})]
        run = assay.Run(model, opt, out=None, methods=methods, strict=strict) if with_assay else None
        seen: list[Tensor] = []
        for micro_batches in data:
            for ids, batch in micro_batches:
                if run is None:
                    loss(model, batch).backward()
                else:
                    with run.step(ids):
                        loss(model, batch).backward()
                seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            opt.step()
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            seen += [
                x.clone() for p in model.parameters() for x in opt.state[p].values() if isinstance(x, Tensor)
            ]
            opt.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        return seen

    plain, valued = history(with_assay=False), history(with_assay=True)
    assert len(plain) == len(valued)
    for a, b in zip(valued, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if strict else 1e-9, atol=0 if strict else 1e-12)


class WithBatchNorm(nn.Module):
    """Batch statistics in one layer, frozen ones in another that the user put into evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(7, 8)
        self.live = nn.BatchNorm1d(8, affine=False)
        self.still = nn.BatchNorm1d(8, affine=False)
        self.leave = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.still(torch.relu(self.live(self.enter(x)))))  # type: ignore[no-any-return]


def test_modes_buffers_and_random_numbers() -> None:
    """The targets' passes leave no trace, even those whose loss draws random numbers or looks at the mode."""
    case = replace(CASES["mlp"], build=WithBatchNorm)
    loss = case.losses["sample_mean"]
    seen: list[bool] = []

    def held_out_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.extend(module.training for module in model.modules())
        noisy = {**batch, "x": batch["x"] + 0.1 * torch.randn_like(batch["x"])}
        return loss(model, noisy)

    def history(with_assay: bool) -> tuple[list[Tensor], list[list[bool]]]:
        model = case.model()
        model.get_submodule("still").eval()
        opt = OPTIMIZERS["adamw"](model)
        target = assay.Target([case.batch(3, seed=7)], held_out_loss)
        methods = [assay.InRunShapley(targets={"held_out": target})]
        run = assay.Run(model, opt, out=None, methods=methods) if with_assay else None
        torch.manual_seed(3)
        states, modes = [], []
        for micro_batches in plan(case, 3, (4, 3)):
            for ids, batch in micro_batches:
                if run is None:
                    loss(model, batch).backward()
                else:
                    with run.step(ids):
                        modes.append([module.training for module in model.modules()])
                        loss(model, batch).backward()
                states += [torch.get_rng_state(), *(b.clone() for b in model.buffers())]
            opt.step()
            opt.zero_grad()
            states += [torch.get_rng_state(), *(b.clone() for b in model.buffers())]
            modes.append([module.training for module in model.modules()])
        if run:
            run.close()
        return states, modes

    plain, modes = history(with_assay=False)
    assert not seen
    valued, valued_modes = history(with_assay=True)
    assert seen
    assert not any(seen)
    assert all(map(torch.equal, valued, plain))
    assert all(mode == modes[0] for mode in modes + valued_modes)


def test_the_generators_of_python_and_numpy() -> None:
    case = CASES["mlp"]
    random.seed(1)
    np.random.seed(1)
    python, numpy = random.getstate(), repr(np.random.get_state(legacy=False))
    Trained(case, "adamw", plan(case, 2, dtype=torch.float32), {})
    assert random.getstate() == python
    assert repr(np.random.get_state(legacy=False)) == numpy


def test_close_takes_everything_off() -> None:
    """After `close` model and optimizer are as free of hooks as before, and can be trained and copied."""
    case = CASES["gpt2"]
    loss = case.losses["token_mean"]
    model = case.model()
    opt = OPTIMIZERS["adamw"](model)

    def hooks() -> list[tuple[int, ...]]:
        return [
            (
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
                len(m._backward_pre_hooks),
            )
            for m in model.modules()
        ] + [(len(opt._optimizer_step_pre_hooks), len(opt._optimizer_step_post_hooks))]

    before, forwards = hooks(), [type(m).forward for m in model.modules()]
    target = assay.Target([case.batch(2, seed=7)], loss)
    run = assay.Run(model, opt, out=None, methods=[assay.InRunShapley(targets={"held_out": target})])
    data = plan(case, 2)
    train(model, opt, data, loss, record=run.step)
    run.close()
    assert hooks() == before
    assert [type(m).forward for m in model.modules()] == forwards
    assert all("forward" not in vars(m) for m in model.modules())
    values = run.ledger.values("held_out")
    train(model, opt, data, loss)
    copy.deepcopy((model, opt))
    assert run.ledger.values("held_out").equals(values)
