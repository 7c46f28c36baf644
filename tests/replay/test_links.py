"""Hessian products from the uses of the weights, and activations twice differentiated, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.demo.gpt import GPT, GPTConfig
from assay.replay import curvature as rooms
from assay.replay.curvature import Curvature
from assay.replay.flat import Flat
from assay.replay.pointwise import KNOWN, pointwise
from assay.snapshots import random_state

QUERIES, ROWS = 3, 4


def loss_fn(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens[:, :-1], tokens[:, 1:])  # type: ignore[no-any-return]


@pytest.mark.parametrize("cached", [0, 1 << 40], ids=["one by one", "together"])
def test_products_and_scores_of_a_gpt(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "CACHED", cached)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocabulary=11, context=6, layers=1, heads=2, width=8)).double()
    flat = Flat(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tokens = torch.randint(11, (ROWS, 6))
    directions = torch.randn(QUERIES, flat.total, dtype=torch.float64)
    found = Curvature(model, flat, loss_fn)
    for _ in range(2):  # the first compares, the second relies on it
        seen = found(tokens, ROWS, random_state(model), directions)
    assert found._linked

    with sdpa_kernel(SDPBackend.MATH):
        slopes = torch.autograd.grad(loss_fn(model, tokens), flat.params, create_graph=True)
        rows = [torch.autograd.grad(loss_fn(model, row[None]) / ROWS, flat.params) for row in tokens]
        for q, parts in enumerate(zip(*flat.split(directions), strict=True)):
            product = torch.autograd.grad(slopes, flat.params, parts, retain_graph=True)
            assert seen.products is not None
            assert torch.allclose(seen.products[q], flat.join(product), rtol=1e-9, atol=1e-12)
            truth = torch.stack([flat.join(row) @ directions[q] for row in rows])
            assert torch.allclose(seen.scores[q], truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("func", KNOWN)
def test_an_activation_is_itself_twice_differentiated(func: Callable[..., Tensor]) -> None:
    def twice(call: Callable[[Tensor], Tensor | None]) -> list[Tensor]:
        x = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
        weights, along = x.detach().cos(), x.detach().sin()
        y = call(x)
        assert y is not None
        (slope,) = torch.autograd.grad(y, x, weights, create_graph=True)
        (bend,) = torch.autograd.grad(slope, x, along, retain_graph=True)
        return [y.detach(), slope.detach(), bend, *torch.autograd.grad(slope, x, weights)]

    for own, plain in zip(twice(lambda x: pointwise(func, x, {})), twice(func), strict=True):
        assert torch.allclose(own, plain, rtol=1e-10, atol=1e-12)


def test_what_is_not_known_is_left_to_torch() -> None:
    x = torch.ones(2, requires_grad=True)
    assert pointwise(F.gelu, x, {"approximate": "tanh"}) is None
    assert pointwise(F.silu, x, {"inplace": True}) is None
    assert pointwise(F.silu, x.bfloat16(), {}) is None
