"""κ_{t,s}: the carried part of a step as a sum over the earlier gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from optimizers.cases import TABLE, Case, gradients
from torch.nn import Parameter
from torch.optim import SGD, Adam, NAdam, Optimizer, RMSprop

from assay.errors import InputError
from assay.optimizers import model_of

CASES = {
    name: Case(case.kind, {**case.options, "weight_decay": 0.0}, {**case.second, "weight_decay": 0.0})
    for name, case in TABLE.items()
}


@pytest.fixture
def double() -> Iterator[None]:
    """Step counts and NAdam's product in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", CASES)
def test_carried_is_the_sum_over_the_tail(name: str) -> None:
    params, optimizer = CASES[name].build()
    model = model_of(optimizer)
    grads: dict[Parameter, list[torch.Tensor]] = {p: [] for p in params}
    scaled: dict[Parameter, list[torch.Tensor]] = {p: [] for p in params}  # gain_s / κ_{s,s}
    for step in gradients(params, steps=7, missing=False):
        t = step + 1
        for p in params:
            split = model.split(p)
            grads[p].append(p.grad.clone())
            scaled[p].append(torch.as_tensor(split.gain) / model.tail(p, t, t))
            carried = torch.zeros_like(p)
            for s in range(1, t):
                through = scaled[p][(s if model.buffer_is_preconditioned else t) - 1]
                carried += model.lr(model.group_index(p)) * through * model.tail(p, t, s) * grads[p][s - 1]
            torch.testing.assert_close(
                torch.as_tensor(split.carried).expand_as(p), carried.detach(), rtol=1e-12, atol=1e-12
            )
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "decay", "tail"),
    [
        (Adam, {"betas": (0.9, 0.99)}, 0.9, 0.1 * 0.9**3 / (1 - 0.9**5)),
        (SGD, {"momentum": 0.8}, 0.8, 0.8**3),
        (SGD, {"momentum": 0.8, "nesterov": True}, 0.8, 0.8**4),
        (SGD, {"momentum": 0.8, "dampening": 0.25}, 0.8, 0.75 * 0.8**3),
        (SGD, {}, 0.0, 0.0),
        (RMSprop, {"momentum": 0.8}, 0.8, 0.8**3),
        (RMSprop, {}, 0.0, 0.0),
        (torch.optim.Adagrad, {}, 0.0, 0.0),
        (torch.optim.Adafactor, {}, 0.0, 0.0),
    ],
)
def test_by_hand(kind: type[Optimizer], options: dict[str, object], decay: float, tail: float) -> None:
    w = Parameter(torch.zeros(2))
    model = model_of(kind([w], lr=0.1, **options))
    assert model.momentum_decay(w) == decay
    assert model.tail(w, 5, 2) == pytest.approx(tail, rel=1e-12)


def test_nadam_far_out() -> None:
    """The product of all μ underflows long before this step, and the weights approach a constant."""
    w = Parameter(torch.zeros(2))
    model = model_of(NAdam([w], betas=(0.9, 0.99)))
    assert model.tail(w, 10**6, 10**6) == pytest.approx((1 - 0.9) + 0.9 * (1 - 0.9), rel=1e-9)


@pytest.mark.parametrize(("t", "s"), [(1, 2), (3, 0), (0, 0)])
def test_no_weight_before_the_gradient(t: int, s: int) -> None:
    w = Parameter(torch.zeros(2))
    with pytest.raises(InputError, match=rf"tail\(t={t}, s={s}\): steps count from 1"):
        model_of(SGD([w], lr=0.1)).tail(w, t, s)
