"""Operations for which torch has neither forward-mode nor second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.capture import Capture, Weights
from assay.capture.operations import general

ROWS = 4


class Prototypes(nn.Module):
    """Distances to learned points."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.inner, self.points, self.p = nn.Linear(6, 3), nn.Parameter(torch.randn(5, 3)), p

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.inner(x), self.points, p=self.p)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_distances_to_a_parameter(p: float) -> None:
    torch.manual_seed(0)
    model, x = Prototypes(p).double(), torch.randn(ROWS, 6).double()
    params = list(model.parameters())
    directions = {param: torch.randn_like(param)[None] for param in params}
    each = [torch.autograd.grad(model(x[i : i + 1]).exp().sum(), params) for i in range(ROWS)]
    want = [
        sum(float((g * directions[q][0]).sum()) for q, g in zip(params, grads, strict=True)) for grads in each
    ]
    capture = Capture(Weights(model.named_parameters(), dict.fromkeys(params, 0)), ROWS, directions)
    with capture:
        model(x).exp().sum().backward()
    assert capture.probe.grad is not None
    assert capture.probe.grad[0, 0].tolist() == pytest.approx(want, rel=1e-9)


def test_distances_in_a_run() -> None:
    torch.manual_seed(0)
    model, batch = Prototypes(2.0).double(), (torch.randn(ROWS, 6).double(), torch.tensor([0, 1, 2, 0]))
    target = assay.Target([batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    with assay.Run(model, optim, methods=[assay.InRunShapley({"t": target})]) as run:
        with run.step(range(ROWS)):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        optim.step()
    assert set(run.coverage()["status"]) == {"exact"}


def test_what_cannot_be_differentiated_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(general._DIFFERENTIABLE, "cdist")
    model, x = Prototypes(2.0), torch.randn(ROWS, 6)
    directions = {param: torch.randn_like(param)[None] for param in model.parameters()}
    capture = Capture(
        Weights(model.named_parameters(), dict.fromkeys(model.parameters(), 0)), ROWS, directions
    )
    with capture, pytest.raises(assay.CoverageError, match=r"points, `cdist`.*second derivative.*exclude="):
        model(x).exp().sum().backward()
