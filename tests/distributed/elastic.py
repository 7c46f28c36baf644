"""Trainings that go on with another number of processes, or in which one process stops measuring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed as dist
from distributed.cases import Case, adamw, data, loss_fn, made, targets_of, wrapped
from torch import nn

import assay
from assay.errors import AssayWarning
from assay.methods.session import InRunSession

NAMES = [
    "fewer_processes_go_on",
    "more_processes_go_on",
    "all_detach_where_one_does",
    "a_missing_folder_is_named",
]
CASE = Case("ddp", targets=(2,))
B = 4


def steps(
    out: Path, rank: int, size: int, taken: Sequence[int], saved: Any = None, save_at: int = -1
) -> tuple[nn.Module, Any]:
    """Take these steps, from a checkpoint if there is one; the model, and the checkpoint of step `save_at`."""
    model = made(CASE)
    model = wrapped(CASE, model) if size > 1 else model
    plain = getattr(model, "module", model)
    optimizer = adamw(model)
    if saved is not None:
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    method = assay.InRunShapley(targets_of(CASE), path="trapezoid")
    resume = False if saved is None else saved["assay"]
    run = assay.Run(model, optimizer, out=out, methods=[method], resume=resume, on_error="detach")
    checkpoint = None
    for step in taken:
        tokens, labels = data(B, step)
        mine = slice(rank * B // size, (rank + 1) * B // size)
        with run.step([f"{step}/{i}" for i in range(B)][mine]):
            loss_fn(model, (tokens[mine], labels[mine])).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == save_at:
            state = run.state_dict()
            checkpoint = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "assay": state}
            torch.save(checkpoint, out.with_name(f"{out.name}-{rank}.pt"))
    run.close()
    dist.barrier() if size > 1 else None
    path = out.with_name(f"{out.name}-{rank}.pt")
    return plain, torch.load(path) if path.exists() else None


def check_same(out: Path, alone: Path) -> None:
    found, known = assay.open(out), assay.open(alone)
    found.verify()
    own, other = (ledger.steps().sort("step", "id") for ledger in (found, known))
    assert own.select("step", "id").equals(other.select("step", "id"))
    assert float((own["value"] - other["value"]).abs().max()) <= 1e-9 * float(other["value"].abs().max())
    own, other = found.account(), known.account()
    assert own["step"].to_list() == other["step"].to_list()
    for line in ("predicted", "carried", "actual"):
        assert float((own[line] - other[line]).abs().max()) <= 1e-9, line


def fewer_processes_go_on(rank: int, size: int, out: Path) -> None:
    _, saved = steps(out, rank, size, range(4), save_at=1)
    if rank == 0:
        steps(out, 0, 1, range(2, 6), saved)
        steps(out.with_name(f"{out.name}-alone"), 0, 1, range(6))
        check_same(out, out.with_name(f"{out.name}-alone"))
    dist.barrier()


def more_processes_go_on(rank: int, size: int, out: Path) -> None:
    if rank == 0:
        steps(out, 0, 1, range(4), save_at=1)
    dist.barrier()
    steps(out, rank, size, range(2, 6), torch.load(out.with_name(f"{out.name}-0.pt")))
    if rank == 0:
        steps(out.with_name(f"{out.name}-alone"), 0, 1, range(6))
        check_same(out, out.with_name(f"{out.name}-alone"))
    dist.barrier()


def all_detach_where_one_does(rank: int, size: int, out: Path) -> None:
    """The disk of one process fails; both go on training, and what was booked is there."""
    with pytest.MonkeyPatch.context() as patch:
        flush = InRunSession.flush

        def refuse(self: InRunSession) -> None:
            if rank == 1:
                raise OSError("planted")
            flush(self)

        patch.setattr(InRunSession, "flush", refuse)
        with pytest.warns(AssayWarning, match="attribution stopped"):
            model, _ = steps(out, rank, size, range(66))
    if rank == 0:
        plain, _ = steps(out.with_name(f"{out.name}-alone"), 0, 1, range(66))
        for own, known in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own, known, rtol=1e-9, atol=1e-9)
        assert assay.open(out).account()["step"].to_list()[:60] == list(range(60))
    dist.barrier()


def a_missing_folder_is_named(rank: int, size: int, out: Path) -> None:
    steps(out, rank, size, range(2))
    if rank == 0:
        (out / "processes" / "0001").rename(out.with_name("elsewhere"))
        with pytest.warns(AssayWarning, match="the folder of process 1 is missing"):
            ledger = assay.open(out)
        assert ledger.steps().filter(pl.col("step") == 0).height == B // 2
        assert ledger.account()["step"].to_list() == [0, 1]
    dist.barrier()
