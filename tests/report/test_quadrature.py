"""The report and the terminal say what points between the ends of the steps cost."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import assay
from assay.cli.summary import _account
from assay.report import write


def ledger(path: str, tolerance: float | None = None) -> assay.Ledger:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    data = torch.eye(3), torch.tensor([0, 1, 2])
    method = assay.InRunShapley(assay.Target([data], loss), path, tolerance=tolerance)
    with assay.Run(model, optimizer, methods=[method]) as run:
        for _ in range(3):
            with run.step([0, 1, 2]):
                loss(model, data).backward()
            optimizer.step()
            optimizer.zero_grad()
    return run.ledger


@pytest.mark.parametrize(("path", "tolerance", "told"), [("simpson", 1e-7, True), ("trapezoid", None, False)])
def test_it_is_told_where_a_path_took_any(
    path: str, tolerance: float | None, told: bool, tmp_path: Path
) -> None:
    found = ledger(path, tolerance)
    page = write(found, tmp_path / "report.html").read_text(encoding="utf-8")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(_account(found, found.targets))
    assert ("Gradients per step" in page) is told
    assert ("gradients of the targets per step" in console.export_text()) is told
    if told:
        points = found.table("quadrature")["points"]
        assert f"at most {points.max()}; 0 of 3 steps missed the tolerance" in page
