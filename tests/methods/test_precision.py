"""The targets' passes run under the autocast of the training's forward passes, wherever the loop enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

import assay

Around = Callable[[], AbstractContextManager[Any]]
BUILDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1),
    "adamw": lambda p: AdamW(p, 0.01),
}


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float(), torch.arange(len(x)))


def trained(
    optimizer: str = "sgd",
    *,
    inside: Around = nullcontext,
    outside: Around = nullcontext,
    target_loss: Callable[[nn.Module, Tensor], Tensor] = loss_fn,
    check: str = "first",
    **options: Any,
) -> tuple[assay.Run, list[tuple[torch.dtype | None, int]]]:
    """Train with autocast inside of `run.step`, or outside; and each target pass's autocast with its step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 4))
    steps = BUILDS[optimizer](model.parameters())
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(5, 4, 7, generator=generator)
    seen: list[tuple[torch.dtype | None, int]] = []
    step = 0

    def watched(model: nn.Module, x: Tensor) -> Tensor:
        on = torch.is_autocast_enabled("cpu")
        seen.append((torch.get_autocast_dtype("cpu") if on else None, step))
        return target_loss(model, x)

    method = assay.InRunShapley(assay.Target([data[4][:3]], watched), **options)
    with assay.Run(model, steps, methods=[method], check=check) as run:
        for step in range(4):
            with outside(), run.step(list(range(4))):
                with inside():
                    loss = loss_fn(model, data[step])
                loss.backward()
            steps.step()
            steps.zero_grad()
    return run, seen


def with_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with half():
        return loss_fn(model, x)


@pytest.mark.parametrize("check", ["first", "off"])
@pytest.mark.parametrize("path", ["left", "trapezoid"])
@pytest.mark.parametrize("optimizer", BUILDS)
def test_values_are_those_of_a_target_that_enters_autocast_itself(
    optimizer: str, path: str, check: str
) -> None:
    own, _ = trained(optimizer, inside=half, target_loss=with_autocast, path=path, check=check)
    followed, seen = trained(optimizer, inside=half, path=path, check=check)
    assert followed.ledger.steps().equals(own.ledger.steps())
    assert followed.ledger.account().equals(own.ledger.account())
    # the first pass of all could not know; it is taken again when the training's first forward pass begins
    assert [dtype for dtype, _ in seen] == [None] + [torch.bfloat16] * (len(seen) - 1)
    assert [step for _, step in seen][:2] == [0, 0]
    plain, _ = trained(optimizer, path=path, check=check)
    assert not followed.ledger.steps().equals(plain.ledger.steps())


def test_no_pass_is_taken_again_where_the_first_was_right() -> None:
    _, outside = trained(outside=half)
    assert [dtype for dtype, _ in outside] == [torch.bfloat16] * 5  # four steps and the end
    _, without = trained()
    assert [dtype for dtype, _ in without] == [None] * 5
    _, again = trained(inside=half)
    assert len(again) == 6


@pytest.mark.parametrize("form", ["bfloat16", "cpu", "factors"])
def test_every_form_of_the_gradient(form: str) -> None:
    own, _ = trained(inside=half, target_loss=with_autocast, target_gradient=form)
    followed, _ = trained(inside=half, target_gradient=form)
    assert followed.ledger.steps().equals(own.ledger.steps())


def test_a_target_may_say_otherwise() -> None:
    """A loss that switches autocast off is evaluated in full precision, as it asks."""

    @contextmanager
    def off() -> Iterator[None]:
        with torch.autocast("cpu", enabled=False):
            yield

    def full(model: nn.Module, x: Tensor) -> Tensor:
        with off():
            out = model(x)
            assert out.dtype == torch.float32
            return F.cross_entropy(out, torch.arange(len(x)))

    trained(inside=half, target_loss=full)


def test_norms_compare_with_gradients_of_the_same_precision() -> None:
    found = []
    for loss in (loss_fn, with_autocast):
        torch.manual_seed(0)
        model = nn.Linear(7, 4)
        optimizer = SGD(model.parameters(), 0.1)
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
        method = assay.GradientNorms({"held out": assay.Target([x[:3]], loss)}, every=2)
        with assay.Run(model, optimizer, methods=[method]) as run:
            for _ in range(3):
                with run.step([0, 1, 2, 3]), half():
                    loss_fn(model, x).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(run.ledger.norms())
    assert found[0].equals(found[1])
    assert found[0]["step"].unique().to_list() == [0, 2]
