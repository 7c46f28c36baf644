"""Disks that refuse, folders that are taken: what was recorded stays."""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from errors.training import CASE, LOSS, Training, is_whole, one_line
from torch.optim import SGD

import assay
from assay.store.recording import Recording


def test_folder_that_already_holds_a_run(tmp_path: Path) -> None:
    """The old run is still there, to the last value."""
    training = Training(out=tmp_path / "run")
    training.step()
    values = training.close().values("held_out")
    with pytest.raises(assay.StoreError, match="already holds a run") as error:
        Training(out=tmp_path / "run")
    assert "run" in one_line(error)
    assert assay.open(tmp_path / "run").values("held_out").equals(values)


def test_refused_run_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model = CASE.model()
    opt = SGD(model.parameters(), lr=0.1)
    target = assay.Target([CASE.batch(3, seed=7)], LOSS)
    hooks = len(opt._optimizer_step_pre_hooks), len(opt._optimizer_step_post_hooks)
    with pytest.raises(assay.StoreError, match="file") as error:
        assay.Run(
            model, opt, out=tmp_path / "file", methods=[assay.InRunShapley(targets={"held_out": target})]
        )
    one_line(error)
    assert (len(opt._optimizer_step_pre_hooks), len(opt._optimizer_step_post_hooks)) == hooks


@contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions bind the superuser too, inside."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
def test_read_only_disk(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with without_privileges(), pytest.raises(assay.StoreError, match=r"cannot write .*run") as error:
            Training(out=tmp_path / "run")
        one_line(error)
    finally:
        tmp_path.chmod(0o755)


FULL_DISK = """
import resource, signal, sys
import torch
sys.path.insert(0, {tests!r})
import assay
from errors.training import Training, is_whole

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
training = Training(out={out!r})
training.step()
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))  # from here on no file can grow
training.step()
try:
    training.run.close()
except assay.StoreError as error:
    print(error)
else:
    sys.exit("no error although the disk is full")
is_whole(training.run.ledger, steps=2)  # in memory
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
training.run.close()
is_whole(assay.open({out!r}), steps=2)  # on the disk, once there is room
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_full_disk(tmp_path: Path) -> None:
    """The error names the folder and says that nothing is lost; closing again, with room, writes all of it."""
    code = FULL_DISK.format(tests=str(Path(__file__).parent.parent), out=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "run") in done.stdout
    assert "lost" in done.stdout


def test_disk_that_refuses_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that fails, again and again, neither drops a row nor books one twice."""
    full = True

    def write_or_refuse(self: Recording, write: Callable[[Recording], None] = Recording.flush) -> None:
        if full:
            raise assay.StoreError("no space left on device: free some")
        write(self)

    monkeypatch.setattr(Recording, "flush", write_or_refuse)
    training = Training(out=tmp_path / "run")
    training.run.writer._flush_every = training.run.writer._flush_at = 1  # as often as can be
    for _ in range(3):
        training.step()
        with suppress(assay.StoreError):
            training.run.status()
    for _ in range(2):
        with pytest.raises(assay.StoreError):
            training.run.close()
    full = False
    training.run.close()
    is_whole(assay.open(tmp_path / "run"), steps=3)


def test_folder_that_disappears_while_the_run_goes_on(tmp_path: Path) -> None:
    """The values stay in memory, and reach the disk once the folder is back."""
    training = Training(out=tmp_path / "run")
    training.step()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    training.step()
    with pytest.raises(assay.StoreError) as error:
        training.run.close()
    one_line(error)
    is_whole(training.run.ledger, steps=2)
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    training.run.close()
    is_whole(assay.open(tmp_path / "run"), steps=2)


def test_run_with_nothing_in_it(tmp_path: Path) -> None:
    """A run that ends before its first step leaves an empty ledger, not a broken one."""
    Training(out=tmp_path / "run").close()
    ledger = assay.open(tmp_path / "run")
    assert ledger.values("held_out").is_empty()
    assert math.isnan(ledger.explained("held_out"))
    assert np.isnan(ledger.explained("held_out"))


def test_open_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(assay.StoreError) as error:
        assay.open(tmp_path)
    assert str(tmp_path) in one_line(error)
