"""A run that is resumed ends with the ledger of one that was never broken off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from methods.slow import batch, loss_fn, net
from torch.optim import SGD, AdamW

import assay
from assay.embedding.session import EmbeddingSession
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
    recording: assay.DataValueEmbedding | None = None,
    valued: bool = True,
    snapshots: Any = None,
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
        methods=[
            *([assay.InRunShapley(target, **options)] if valued else []),
            *([recording] if recording else []),
        ],
        resume=(state or True) if resume is None else resume,
        check="off",
        snapshots=snapshots,
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
    for session in run._sessions:  # what is on its way to the disk arrives, and nothing after it
        if isinstance(session, EmbeddingSession):
            session._background.wait()
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
    with pytest.raises(InputError, match=r"recorded with methods .*data value embedding"):
        assay.Run(model, adamw, out=out, methods=[shapley, embedding], resume=True)
    with pytest.raises(InputError, match="a run in memory ends with its process"):
        assay.Run(model, adamw, methods=[shapley], resume=True)


def recording(curvature: str = "fisher", **options: Any) -> assay.DataValueEmbedding:
    given = {"projection": assay.Projection(rank=2, seed=3), "shard": 5, "draws": 2, **options}
    return assay.DataValueEmbedding(curvature=curvature, **given)


def files(out: Path) -> dict[str, Any]:
    """What was recorded beside the tables: gradients and projections byte for byte, snapshots tensor for tensor."""
    found: dict[str, Any] = {}
    for path in sorted((out / "embeddings").rglob("*")):
        if path.is_file():
            found[str(path.relative_to(out))] = path.read_bytes()
    for path in sorted((out / "snapshots").glob("*.pt")):
        leaves, tree = torch.utils._pytree.tree_flatten(torch.load(path))
        found[path.name[:-12]] = (
            [x.numpy().tobytes() if isinstance(x, torch.Tensor) else x for x in leaves],
            str(tree),
        )
    return found


@pytest.mark.parametrize(
    ("optimizer", "curvature", "snapshots", "breaks", "support"),
    [
        ("adamw", "fisher", "auto", (5, 8), None),
        ("adamw", "ggn", 2, (1, 4), None),
        ("adamw", "ggn", "auto", (2, 5), 3),
        ("sgd", "ggn", "auto", (3,), 3),
        ("sgd", "fisher", "60 kB", (7,), None),
    ],
)
@pytest.mark.parametrize("close", [False, True], ids=["killed", "closed"])
def test_recorded_gradients_and_snapshots_go_on(
    optimizer: str,
    curvature: str,
    snapshots: Any,
    breaks: tuple[int, ...],
    support: int | None,
    close: bool,
    tmp_path: Path,
) -> None:
    """Broken off between checkpoints and at them: rows, projections and snapshots are those of an unbroken run."""
    options: Any = {"optimizer": optimizer, "snapshots": snapshots, "valued": close}
    projection = assay.Projection(rank=2, seed=3, support=support)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, **options, recording=recording(curvature, projection=projection))
    for step in breaks:
        train(
            broken, **options, recording=recording(curvature, projection=projection), until=step, close=close
        )
        if close:
            assay.open(broken).embeddings(segments=1)  # of a past that is partly overruled
    train(broken, **options, recording=recording(curvature, projection=projection))
    assert files(broken) == files(whole)
    a, b = assay.open(broken), assay.open(whole)
    assert torch.equal(a.embeddings(segments=2).export(), b.embeddings(segments=2).export())
    if close:  # else nothing is valued
        assert a.account().equals(b.account())
        assert a.steps().equals(b.steps())


def test_recorded_gradients_without_a_told_step(tmp_path: Path) -> None:
    """The optimizer's count finds the step; what was not yet committed is lost, and that is said."""
    options: Any = {"recording": recording(), "valued": False, "told": False}
    train(tmp_path / "whole", **options)
    train(tmp_path / "run", **options, until=5)
    train(tmp_path / "run", **options)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    late = {**options, "recording": recording(shard=25)}
    train(tmp_path / "late", **late, until=8, close=False)
    with pytest.warns(AssayWarning, match=r"goes on at step 6, but the last step .* holds is 3"):
        train(tmp_path / "late", **late)
    steps = assay.open(tmp_path / "late").embeddings(segments=1).rows["step"].unique().to_list()
    assert sorted(steps) == [0, 1, 2, 3, 6, 7, 8]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"projection": assay.Projection(rank=2, seed=4)}, r"projection .*seed=3.* and not .*seed=4"),
        ({"dtype": "fp32"}, "dtype.*bf16.*fp32"),
        ({"draws": 1, "curvature": "ggn"}, "draws"),
    ],
)
def test_gradients_of_other_settings_are_not_gone_on_with(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    train(tmp_path / "run", recording=recording("ggn"), until=4)
    before = files(tmp_path / "run")
    with pytest.raises(InputError, match=says):
        train(tmp_path / "run", recording=recording(**{"curvature": "ggn", **change}))
    assert files(tmp_path / "run") == before


def test_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, until=4)
    target = assay.Target([batch(4, 99)], loss_fn)
    method = assay.InRunShapley(target, path="trapezoid")
    model = net()
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(
        InputError, match=r"recorded of another model: \d+ parameters of \d+ entries, and now"
    ):
        assay.Run(model, AdamW(model.parameters()), out=out, methods=[method], resume=3)


def test_other_data_than_the_first_time_is_said(tmp_path: Path) -> None:
    """Only steps that were recorded behind the checkpoint can tell, and once is enough."""
    out = tmp_path / "run"
    train(out, until=5)
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.03)
    method = assay.InRunShapley(assay.Target([batch(4, 99)], loss_fn), path="trapezoid")
    run = assay.Run(model, optimizer, out=out, methods=[method], resume=3, check="off")
    said = "step 3 has other samples than when it was recorded before"
    for step in range(3, 6):
        with run.step([f"other {step} {i}" for i in range(3)]):
            loss_fn(model, batch(3, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with pytest.warns(AssayWarning, match=said) if step == 3 else nullcontext():
            run.state_dict()
    run.close()


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
