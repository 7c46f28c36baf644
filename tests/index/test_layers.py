"""A weight that an embedding shares with a head: all its uses, or those of the head alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import InputError
from assay.index import Index
from assay.projection import Projection

N = 6


class Tied(nn.Module):
    """A table of tokens whose weight is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T, 7]`."""
        out: Tensor = self.head(torch.tanh(self.body(self.token(tokens))))
        return out


def loss_fn(model: nn.Module, batch: object) -> Tensor:
    """The mean over rows of the sum over positions."""
    assert isinstance(batch, Tensor)
    return F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none").sum(1).mean()


def dense(model: nn.Module, rows: Tensor, names: list[str]) -> Tensor:
    """`[B, entries]`: each row's own gradient, parameter behind parameter."""
    named = dict(model.named_parameters())
    found = [
        torch.autograd.grad(loss_fn(model, rows[i : i + 1]), [named[n] for n in names]) for i in range(N)
    ]
    return torch.stack([torch.cat([g.flatten() for g in gs]) for gs in found])


@pytest.fixture
def model() -> Tied:
    """With weights that are always the same."""
    torch.manual_seed(0)
    return Tied().double()


@pytest.fixture
def rows() -> Tensor:
    """`[N, T + 1]` tokens."""
    return torch.randint(7, (N, 6), generator=torch.Generator().manual_seed(1))


def build(model: nn.Module, rows: Tensor, out: Path | None = None, **options: object) -> Index:
    """An index of whole gradients."""
    return Index.build(
        model, [(range(N), rows)], loss_fn, out=out, projection=Projection(kind="none"), dtype="fp64",
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("layers", [[nn.Linear], ["body", "head"]])
def test_the_head_alone_is_that_of_a_model_that_shares_nothing(
    layers: list[str | type[nn.Module]], model: Tied, rows: Tensor, tmp_path: Path
) -> None:
    apart = copy.deepcopy(model)
    apart.head.weight = nn.Parameter(model.head.weight.detach().clone())
    build(model, rows, tmp_path / "index", layers=layers)
    index = Index.open(tmp_path / "index")
    truth = dense(apart, rows, ["body.weight", "body.bias", "head.weight"])
    assert index.layers["layer"].to_list() == ["body", "head"]
    torch.testing.assert_close(index.gradients(), truth)
    scores = index.influence(model, [rows], loss_fn, curvature="identity")
    torch.testing.assert_close(scores, truth @ truth.t())


@pytest.mark.parametrize("layers", [None, ["token", "body", "head"]])
def test_both_together_are_the_whole_gradient(layers: list[str] | None, model: Tied, rows: Tensor) -> None:
    index = build(model, rows, layers=layers)
    assert index.layers["layer"].to_list() == ["token", "body"]
    torch.testing.assert_close(
        index.gradients(), dense(model, rows, ["token.weight", "body.weight", "body.bias"])
    )


def test_a_head_that_was_not_chosen_cannot_be_left_out(model: Tied, rows: Tensor) -> None:
    assert build(model, rows, exclude=["token.weight"]).layers["layer"].to_list() == ["body"]
    assert build(model, rows, layers=[nn.Linear], exclude=["head"]).layers["layer"].to_list() == ["body"]
    with pytest.raises(InputError, match="no such trainable parameter"):
        build(model, rows, exclude=["head"])
