"""Rows of convolutions of every form against the projection of each sample's own gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.capture import Weights
from assay.projection import Projection, Projector, random_sides

CASES = {
    "plain": (nn.Conv2d, (3, 5, 3), {}),
    "strided": (nn.Conv2d, (3, 5, 3), {"stride": 2, "padding": 1}),
    "dilated": (nn.Conv2d, (3, 5, 2), {"dilation": 2, "padding": "same"}),
    "one by one": (nn.Conv2d, (3, 5, 1), {}),
    "wide kernel": (nn.Conv2d, (3, 5, (1, 4)), {"padding": (0, 2), "padding_mode": "reflect"}),
    "grouped": (nn.Conv2d, (4, 6, 3), {"groups": 2}),
    "depthwise": (nn.Conv2d, (4, 4, 3), {"groups": 4, "bias": False}),
    "grouped, strided, dilated": (
        nn.Conv2d,
        (4, 6, (3, 2)),
        {"groups": 2, "stride": (2, 1), "dilation": (1, 3), "padding": (2, 1)},
    ),
    "same, unevenly": (nn.Conv2d, (3, 5, (2, 4)), {"padding": "same"}),
    "1d": (nn.Conv1d, (3, 5, 3), {"padding": 1}),
    "3d": (nn.Conv3d, (2, 3, 2), {}),
    "3d, strided": (nn.Conv3d, (2, 3, 2), {"stride": 2, "padding": 1}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("rank", [None, 4, 40])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_dense_projection(name: str, rank: int | None) -> None:
    torch.manual_seed(0)
    kind, sizes, options = CASES[name]
    layer: Any = kind(*sizes, **options).double()
    sides_of_space = {nn.Conv1d: (9,), nn.Conv2d: (7, 6), nn.Conv3d: (4, 3, 5)}[kind]  # type: ignore[index]
    x = torch.randn(5, sizes[0], *sides_of_space, dtype=torch.float64)

    def loss(model: nn.Module, x: Any) -> Tensor:
        return F.softplus(model(x)).square().sum()

    projection = Projection(kind="none") if rank is None else Projection(rank=rank)
    named = list(layer.named_parameters())
    weights = Weights(named, {p: 0 for _, p in named})
    sides = {n: random_sides(n, p, projection) for n, p in named}
    found = Projector(weights, sides).rows(layer, loss, x, 5, "sum", check=True)
    for i in range(5):
        row = []
        for (n, _), g in zip(
            named, torch.autograd.grad(loss(layer, x[i : i + 1]), [p for _, p in named]), strict=True
        ):
            matrix = g.reshape(sides[n].matrix)
            matrix = matrix if sides[n].left is None else sides[n].left.double() @ matrix  # type: ignore[union-attr]
            row.append((matrix if sides[n].right is None else matrix @ sides[n].right.double().t()).flatten())  # type: ignore[union-attr]
        truth = torch.cat(row)
        assert (found[i] - truth).abs().max() <= 1e-10 * truth.abs().max()
