"""When snapshots are taken, which remain, and that their files are data."""

from __future__ import annotations

import os
import pickle
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from replay.common import STEPS, Problem
from torch.overrides import _get_current_function_mode

import assay
from assay.errors import InputError, StoreError
from assay.replay import Trajectory
from assay.replay.plan import plan_of
from assay.snapshots import Snapshots, random_state, same_random_state, set_random_state, snapshot_settings
from assay.store.tensors import TensorFiles

PROBLEM = Problem("adamw", clip=0.4, schedule=True, micro=2)


@pytest.mark.parametrize("steps", [1, 2, 5, 37, 100, 1000, 10_000])
def test_about_the_root_of_the_steps_remains(steps: int) -> None:
    kept = Snapshots().kept(steps)
    assert kept[0] == 0
    assert kept[-1] == steps
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) <= steps**0.5 + 1
    assert len(kept) <= 2 * steps**0.5 + 2
    within = Snapshots(budget=10_000).kept(steps, 1000)
    assert len(within) <= 10


@pytest.mark.parametrize("settings", ["auto", 4, "20 kB", Snapshots(every=2, budget=30_000)])
def test_what_remains_of_a_run_is_what_was_planned(settings: Any, tmp_path: Path) -> None:
    ledger, *_ = PROBLEM.recorded(tmp_path / "run", snapshots=settings)
    files = TensorFiles(tmp_path / "run" / "snapshots")
    each = max(path.stat().st_size for path in files.folder.glob("state-*")) if files.folder else 0
    chosen = snapshot_settings(settings)
    assert chosen is not None
    assert tuple(files.numbers("state")) == chosen.kept(STEPS, each)
    assert Trajectory(files).end == STEPS
    assert ledger.rows.height == STEPS * 6


def test_disk_is_as_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(200, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    with assay.Run(model, optimizer, out=tmp_path / "run", snapshots="auto") as run:
        for step in range(20):
            with run.step([step, step + 1]):
                model(torch.randn(2, 200)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    planned = plan_of(model, optimizer, 20).disk
    found = TensorFiles(tmp_path / "run" / "snapshots").bytes()
    assert planned <= found <= 1.2 * planned


def test_nothing_pickled_is_read(tmp_path: Path) -> None:
    files = TensorFiles(tmp_path)
    files.write("state", 0, {"w": torch.ones(3)})
    (path,) = tmp_path.glob("state-*")
    assert zipfile.is_zipfile(path)

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    files.write("state", 1, {"w": Evil()})
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        files.read("state", 1)
    with pytest.raises(StoreError, match=r"no state number 5"):
        files.read("state", 5)


def test_random_states_come_back() -> None:
    import random

    import numpy as np

    model = torch.nn.Linear(1, 1)
    state = random_state(model)
    drawn = torch.rand(3), random.random(), np.random.rand()
    assert not same_random_state(state, random_state(model))
    set_random_state(state)
    assert same_random_state(state, random_state(model))
    assert torch.equal(torch.rand(3), drawn[0])
    assert (random.random(), np.random.rand()) == drawn[1:]


def test_settings_that_are_none_are_refused() -> None:
    for wrong in (0, -3, "often", "3 apples", 2.5):
        with pytest.raises(InputError):
            snapshot_settings(wrong)
    assert snapshot_settings(None) is None
    assert snapshot_settings("1.5 GB") == Snapshots(budget=1_500_000_000)


def test_training_is_what_it_is_without_snapshots(tmp_path: Path) -> None:
    _, with_snapshots, _ = PROBLEM.recorded(tmp_path / "run", strict=True)
    model = PROBLEM.model()

    def backward(step: int, m: int, batch: Any) -> None:
        from replay.common import loss_fn

        (loss_fn(model, batch) / PROBLEM.micro).backward()

    PROBLEM.train(model, PROBLEM.optimizer(model), backward)
    pairs = zip(model.parameters(), with_snapshots.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


class Seen(torch.nn.Linear):
    """Notes whether a capture is active while it runs."""

    modes: list[str]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As a linear layer."""
        mode = _get_current_function_mode()
        self.modes.append(type(mode).__name__)
        return super().forward(x)


@pytest.mark.parametrize("check", ["first", "off"])
def test_a_run_that_only_takes_snapshots_captures_no_more_than_the_check(check: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Seen(3, 2)
    plain = torch.nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    model.modes = []
    with assay.Run(model, optimizers[0], out=tmp_path / "run", snapshots=2, check=check) as run:
        for _ in range(4):
            x = torch.randn(5, 3)
            plain(x).square().sum().backward()
            with run.step(range(5)):
                model(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        with pytest.raises(InputError, match="no backward pass happened inside"), run.step(range(5)):
            model(x)
        with pytest.raises(InputError, match="5 ids were given"), run.step(range(5)):
            model(x[:3])
    assert model.modes[-4:] == ["NoneType"] * 4
    assert ("Capture" in model.modes) == (check == "first")
    assert set(run.coverage()["status"]) == {"exact" if check == "first" else "not measured"}
    assert torch.allclose(model.weight, plain.weight)
    if check == "off":
        assert torch.equal(model.weight, plain.weight)
    assert Trajectory(TensorFiles(tmp_path / "run" / "snapshots")).end == 4
