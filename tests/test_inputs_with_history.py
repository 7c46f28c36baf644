"""Inputs and weights that the loop computes itself: their graph outlives the start-up check, and their uses count."""

# mypy: allow-untyped-calls
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import assay

LR = 0.1


class _Embedded(nn.Module):
    """Takes the embeddings that its own table gives."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(inputs_embeds)).mean(1))  # type: ignore[no-any-return]


def _own_embeddings(model: Any, ids: Tensor) -> Tensor:
    return model(inputs_embeds=model.table(ids))  # type: ignore[no-any-return]


def _scaled_weights(model: Any, ids: Tensor) -> Tensor:
    """Another set of weights, computed from the parameters, in their place."""
    weights = {name: torch.tanh(p) for name, p in model.named_parameters()}
    return functional_call(model, weights, (F.one_hot(ids, 6).double(),))  # type: ignore[no-any-return]


def _with_a_gradient(model: Any, ids: Tensor) -> Tensor:
    """An input that asks for its gradient."""
    return model(F.one_hot(ids, 6).double().requires_grad_())  # type: ignore[no-any-return]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("on_error", ["raise", "detach"])
@pytest.mark.parametrize("predict", [_own_embeddings, _scaled_weights, _with_a_gradient])
def test_values_are_the_dense_ones(predict: Callable[..., Tensor], on_error: Any, strict: bool) -> None:
    """With the start-up check, and without a word from it."""
    torch.manual_seed(0)
    model = _Embedded().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    batches = [(torch.randint(0, 6, (4, 5)), torch.tensor([0, 1, 2, 0])) for _ in range(3)]

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(predict(model, batch[0]), batch[1])

    params, held = list(model.parameters()), batches.pop()
    run = assay.Run(
        model,
        optimizer,
        methods=[assay.InRunShapley(assay.Target([held], loss))],
        strict=strict,
        on_error=on_error,
    )
    expected = []
    for t, batch in enumerate(batches):
        G = torch.autograd.grad(loss(model, held), params, allow_unused=True)
        each = F.cross_entropy(predict(model, batch[0]), batch[1], reduction="none") / 4
        for one in each:
            g = torch.autograd.grad(one, params, retain_graph=True, allow_unused=True)
            pairs = [(x, y) for x, y in zip(g, G, strict=True) if x is not None and y is not None]
            expected.append(LR * sum(float((x * y).sum()) for x, y in pairs))
        with warnings.catch_warnings(), run.step([10 * t + i for i in range(4)]):
            warnings.simplefilter("error")
            loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    found = run.ledger.values("target").sort("id")["value"].to_list()
    assert found == pytest.approx(expected, rel=1e-9)
