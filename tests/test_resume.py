"""A run that is resumed ends with the ledger of one that was never broken off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from methods.slow import batch, loss_fn, net
from torch.optim import SGD, AdamW

import assay
from assay.errors import AssayWarning, InputError, StoreError

STEPS = 9
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda m: AdamW(m.parameters(), lr=0.03),
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.8),
}


def train(
    out: Path,
    *,
    optimizer: str = "adamw",
    every: int = 3,
    until: int = STEPS,
    close: bool = True,
    resume: Any = None,
    told: bool = True,
    skip: int | None = None,
    flush_at: tuple[int, ...] = (),
    **method: Any,
) -> assay.Run:
    """Train from the last checkpoint beside `out` to step `until`, checkpoints being saved `every` few steps."""
    checkpoint = out.with_suffix(".pt")
    model = net()
    opt = OPTIMIZERS[optimizer](model)
    start, state = 0, None
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        start, state = saved["done"], saved["assay"]
    options = {"path": "trapezoid", **method}
    target = assay.Target([batch(4, 99)], loss_fn)
    run = assay.Run(
        model,
        opt,
        out=out,
        methods=[assay.InRunShapley(target, **options)],
        resume=(state or True) if resume is None else resume,
        check="off",
    )
    for step in range(start, until):
        for micro in range(2):
            with run.step([f"{step}-{micro}-{i}" for i in range(3)]):
                (loss_fn(model, batch(3, 2 * step + micro)) / 2).backward()
        run.log({"loss": float(step)})
        if step != skip:  # a loss scaler's overflow
            opt.step()
        opt.zero_grad()
        if (step + 1) % every == 0:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": opt.state_dict(),
                    "done": step + 1,
                    "assay": run.state_dict() if told else None,
                },
                checkpoint,
            )
        if step in flush_at:
            _ = run.status()
            run.writer.flush()
    if close:
        run.close()
    return run


def tables(out: Path) -> dict[str, pl.DataFrame]:
    ledger = assay.open(out)
    ledger.verify()
    found = {"steps": ledger.steps(), "account": ledger.account(), "values": ledger.values()}
    side = {name: ledger.table(name).drop("seconds", strict=False) for name in ledger.tables}
    return found | side


def check_same(out: Path, other: Path) -> None:
    own, known = tables(out), tables(other)
    assert own.keys() == known.keys()
    for name, table in known.items():
        assert own[name].equals(table, null_equal=True), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(**options: Any) -> Path:
        key = json.dumps(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("unbroken") / "run"
            train(made[key], **options)
        return made[key]

    return folder


@pytest.mark.parametrize(
    ("optimizer", "path", "broken_at"),
    [
        ("adamw", "left", 5),
        ("adamw", "trapezoid", 3),
        ("adamw", "simpson", 1),
        ("sgd", "trapezoid", 8),
        ("sgd", "left", 1),
    ],
)
def test_a_run_broken_off_anywhere_ends_the_same(
    optimizer: str, path: str, broken_at: int, unbroken: Any, tmp_path: Path
) -> None:
    """Nothing is closed: what waits in memory is lost with the process."""
    out = tmp_path / "run"
    train(out, optimizer=optimizer, until=broken_at, close=False, path=path)
    train(out, optimizer=optimizer, path=path)
    check_same(out, unbroken(optimizer=optimizer, path=path))


def test_steps_that_were_recorded_after_the_checkpoint_are_replaced(unbroken: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, until=5, close=False, flush_at=(3, 4))  # the checkpoint is of step 3
    assert assay.open(out).steps()["step"].max() == 3
    train(out, until=8, close=False, flush_at=(6, 7))
    train(out)
    check_same(out, unbroken())
    train(out)  # from the end: nothing is left to do
    check_same(out, unbroken())
    parts = list((out / "values").iterdir())
    assert sum(len(pl.read_parquet(part)) for part in parts) > len(
        assay.open(out).steps()
    )  # all is still there


def test_the_optimizers_count_tells_the_step(unbroken: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, until=5, told=False, flush_at=(2,))
    train(out, until=7, told=False, flush_at=(5,))
    train(out, told=False)
    known, found = unbroken(), assay.open(out)
    assert found.steps().equals(assay.open(known).steps())
    assert found.account().equals(assay.open(known).account())


def test_a_skipped_step_keeps_its_number(unbroken: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, until=5, skip=1, told=False)
    train(out, skip=1, told=False)
    assert assay.open(out).account().equals(assay.open(unbroken(skip=1, told=False)).account())
    assert assay.open(out).account()["status"].to_list()[1] == "skipped"


def test_what_was_lost_between_checkpoints_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, until=5, told=False, close=False)
    with pytest.warns(AssayWarning, match=r"goes on at step 3, but the last step .* is none.*state_dict"):
        train(out, told=False)
    assert assay.open(out).steps()["step"].min() == 3


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, until=5)
    with pytest.raises(InputError, match=r"recorded with methods .*trapezoid.* and not .*simpson"):
        train(out, path="simpson")
    with pytest.raises(StoreError, match="already holds a run"):
        train(out, resume=False)
    with pytest.raises(InputError, match=r"resume=-1.* names no step"):
        train(out, resume=-1)
    model = net()
    target = assay.Target([batch(4, 99)], loss_fn)
    sgd, adamw = SGD(model.parameters(), lr=0.1), AdamW(model.parameters())
    shapley, embedding = assay.InRunShapley(target), assay.DataValueEmbedding(assay.Projection(rank=2))
    with pytest.raises(InputError, match="SGD does not count its steps"):
        assay.Run(model, sgd, out=out, methods=[shapley], resume=True)
    with pytest.raises(InputError, match="DataValueEmbedding does not go on"):
        assay.Run(model, adamw, out=out, methods=[embedding], resume=True)
    with pytest.raises(InputError, match="a run in memory ends with its process"):
        assay.Run(model, adamw, methods=[shapley], resume=True)


def test_a_process_that_is_terminated_writes_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from methods.slow import batch, loss_fn, net
from torch.optim import AdamW
import assay
model = net()
optimizer = AdamW(model.parameters())
target = assay.Target([batch(4, 99)], loss_fn)
with assay.Run(model, optimizer, out={str(out)!r}, methods=[assay.InRunShapley(target)]) as run:
    for step in range(5):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        with run.step([1, 2, 3]):
            loss_fn(model, batch(3, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert assay.open(out).account()["step"].to_list() == [0, 1, 2, 3]
    assert os.path.exists(out / "run.json")
