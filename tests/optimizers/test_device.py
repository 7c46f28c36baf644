"""State on an accelerator, imitated by fake tensors: devices must fit, and reading a value is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers.cases import OPTIONS
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from assay.optimizers import model_of

CAPTURABLE = (Adam, AdamW, NAdam, RAdam, RMSprop)
CASES = {
    f"{kind.__name__}-{name}-{'device' if device else 'host'}": (kind, options, device)
    for kind, table in OPTIONS.items()
    for name, options in table.items()
    for device in (False, True)
    if not device or kind in CAPTURABLE or kind is Adagrad
}


def state_of(kind: type[Optimizer], group: dict[str, Any], like: Tensor, step: Tensor) -> dict[str, Tensor]:
    """The state as ``torch.optim`` lays it out, its values unknown."""
    full = torch.empty_like(like)
    if kind is SGD:
        return {"momentum_buffer": full} if group["momentum"] else {}
    if kind is Adagrad:
        return {"step": step, "sum": full}
    if kind is RMSprop:
        return {"step": step, "square_avg": full, "momentum_buffer": full, "grad_avg": full}
    if kind is Adafactor:
        return {"step": step, "row_var": full.new_empty(4, 1), "col_var": full.new_empty(1, 3)}
    state = {"step": step, "exp_avg": full, "exp_avg_sq": full, "max_exp_avg_sq": full}
    return {**state, "mu_product": torch.empty_like(step)} if kind is NAdam else state


@pytest.mark.parametrize("name", CASES)
def test_no_value_is_read_from_the_device(name: str) -> None:
    kind, options, on_device = CASES[name]
    w = Parameter(torch.ones(4, 3))
    optimizer = kind([w], lr=0.1, **options)
    with FakeTensorMode():
        fake = Parameter(torch.empty(4, 3, device="cuda", dtype=torch.bfloat16))
        fake.grad = torch.empty_like(fake)
        group = optimizer.param_groups[0]
        group["params"] = [fake]
        step = torch.empty((), device="cuda") if on_device else torch.tensor(3.0)
        optimizer.state.clear()
        optimizer.state[fake] = state_of(kind, group, fake, step)
        if kind is NAdam and not on_device:
            optimizer.state[fake]["mu_product"] = torch.tensor(0.3)
        if on_device or kind is SGD:
            group["lr"] = torch.empty((), device="cuda")
        model = model_of(optimizer)
        split, foreseen = model.split(fake), model.previous_gain(fake)
        lr = model.lr(0)
        update = lr * split.gain * fake.grad + split.carried + split.decayed
        assert update.device.type == "cuda"
        for part in (split.gain, split.carried, split.decayed, foreseen):
            if isinstance(part, Tensor) and part.dim():
                assert (part.device.type, part.dtype, part.shape) == ("cuda", torch.float32, (4, 3))


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Adagrad])
def test_gradscaler_is_not_waited_for(kind: type[Optimizer]) -> None:
    optimizer = kind([Parameter(torch.ones(4, 3))], lr=0.1)
    with FakeTensorMode():
        fake = Parameter(torch.empty(4, 3, device="cuda"))
        fake.grad = torch.empty_like(fake)
        optimizer.param_groups[0]["params"] = [fake]
        step = torch.empty((), device="cuda")
        optimizer.state[fake] = state_of(kind, optimizer.param_groups[0], fake, step)
        optimizer.grad_scale = torch.empty((1,), device="cuda")
        optimizer.found_inf = torch.empty((1,), device="cuda")
        split = model_of(optimizer).split(fake)
        assert torch.as_tensor(split.gain).device.type == "cuda"
        assert torch.broadcast_shapes(torch.as_tensor(split.gain).shape, (4, 3)) == (4, 3)


def test_the_imitation_notices_a_read() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty((), device="cuda").item()


@pytest.mark.parametrize("kind", [Adam, NAdam, RAdam])
def test_step_counts_on_a_device_take_the_same_values(
    kind: type[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor branch of the scalar arithmetic, on the host."""
    import assay.optimizers.adam
    import assay.optimizers.nadam
    import assay.optimizers.radam
    import assay.optimizers.scalars

    torch.manual_seed(0)
    w = Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = kind([w], lr=0.1, weight_decay=0.1)
    model = model_of(optimizer)

    def answers() -> list[Tensor]:
        split = model.split(w)
        return [
            torch.as_tensor(x) for x in (split.gain, split.carried, split.decayed, model.previous_gain(w))
        ]

    def as_on_a_device(x: Any) -> Any:
        return x.reshape(()).double() if isinstance(x, Tensor) else float(x)

    for _ in range(8):
        w.grad = torch.randn_like(w)
        optimizer.step()
        w.grad = torch.randn_like(w)
        host = answers()
        with monkeypatch.context() as patch:
            for module in (
                assay.optimizers.adam,
                assay.optimizers.nadam,
                assay.optimizers.radam,
                assay.optimizers.scalars,
            ):
                patch.setattr(module, "number", as_on_a_device)
            device = answers()
        for a, b in zip(device, host, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if kind is NAdam else 1e-13, atol=1e-13)
