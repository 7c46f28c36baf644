"""What the first step's totals are compared with: `.grad` as the loop leaves it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay

ROWS, RATE = 4, 0.1
Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def drawn() -> Batch:
    return torch.randn(ROWS, 5, dtype=torch.float64), torch.randint(0, 3, (ROWS,))


@pytest.mark.parametrize("to_none", [True, False])
def test_a_gradient_from_before_the_run_is_cleared_inside_of_the_first_step(to_none: bool) -> None:
    torch.manual_seed(0)
    model, batch, held = nn.Linear(5, 3).double(), drawn(), drawn()
    optim = torch.optim.SGD(model.parameters(), lr=RATE)
    params = list(model.parameters())
    G = torch.autograd.grad(loss(model, held), params)
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none") / ROWS
    want = [
        RATE
        * sum(
            float((g * h).sum())
            for g, h in zip(torch.autograd.grad(x, params, retain_graph=True), G, strict=True)
        )
        for x in each
    ]
    loss(model, drawn()).backward()
    method = assay.InRunShapley({"t": assay.Target([held], loss)})
    with assay.Run(model, optim, methods=[method]) as run:
        with run.step(range(ROWS)):
            optim.zero_grad(set_to_none=to_none)
            loss(model, batch).backward()
        optim.step()
    assert run.ledger.values("t").sort("id")["value"].to_list() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("returns", ["rows", "loss"])
def test_a_hook_on_a_parameter_is_named(returns: str) -> None:
    """Rows of a table are frozen behind the capture's back."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(9, 6), nn.Linear(30, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            rows = self.out(self.table(x).flatten(1))
            return rows if returns == "rows" else F.cross_entropy(rows, y)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        out = model(*batch)
        return F.cross_entropy(out, batch[1]) if returns == "rows" else out

    torch.manual_seed(0)
    model, batch = Table(), (torch.randint(0, 9, (ROWS, 5)), torch.tensor([0, 1, 2, 0]))
    kept = (torch.arange(9) > 4).float()[:, None]
    model.table.weight.register_hook(lambda gradient: gradient * kept)
    optim = torch.optim.SGD(model.parameters(), lr=RATE)
    run = assay.Run(model, optim, methods=[assay.InRunShapley({"t": assay.Target([batch], loss)})])
    with (
        pytest.raises(assay.CoverageError, match=r"hook on table\.weight.*register_hook.*remove it"),
        run.step(range(ROWS)),
    ):
        loss(model, batch).backward()
