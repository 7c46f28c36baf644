"""Disks that are full, read-only or gone, and interrupts: no row is lost, none is stored twice."""

from __future__ import annotations

import builtins
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from store.runs import check, fill

from assay.errors import StoreError
from assay.store import RunWriter, open_ledger


def refuse(name: str, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **options: Any) -> Any:
            raise OSError(number, os.strerror(number))

        def fail_to_write(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            return fail() if "w" in mode else real_open(path, mode, *args, **options)

        real_open = builtins.open
        monkeypatch.setattr(*((builtins, "open", fail_to_write) if name == "open" else (os, name, fail)))

    return patch


@pytest.mark.parametrize(
    ("name", "number", "says"),
    [
        ("fsync", errno.ENOSPC, "No space left on device): free some space"),
        ("replace", errno.ENOSPC, "No space left on device): free some space"),
        ("open", errno.EROFS, "Read-only file system): make the disk writable"),
        ("open", errno.EACCES, "Permission denied): make the folder writable"),
        ("replace", errno.EROFS, "Read-only file system): make the disk writable"),
        ("fsync", errno.EIO, "Input/output error): check that disk"),
    ],
)
def test_a_disk_that_refuses_costs_no_row(
    name: str, number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    fill(writer, range(3))
    writer.flush()
    fill(writer, range(3, 5))
    with monkeypatch.context() as patch:
        refuse(name, number)(patch)
        for _ in range(2):
            with pytest.raises(StoreError) as raised:
                writer.flush()
            message = str(raised.value)
            assert says in message
            assert str(tmp_path / "run") in message
            assert "nothing recorded is lost: 6 rows wait in memory" in message
            assert "\n" not in message
        with pytest.raises(StoreError):
            writer.close()
        check(open_ledger(tmp_path / "run"), 3)
    check(open_ledger(tmp_path / "run"), 3)
    check(writer.ledger, 5)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    fill(writer, range(5, 6))
    writer.close()
    check(open_ledger(tmp_path / "run"), 6)
    check(writer.ledger, 6)


def test_a_write_that_the_system_cuts_short_costs_no_row(tmp_path: Path) -> None:
    """Refused by the kernel: files of this process may not grow beyond a few hundred bytes."""
    writer = RunWriter(tmp_path / "run", ["t"])
    fill(writer, range(4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        with pytest.raises(StoreError) as raised:
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(raised.value)
    assert open_ledger(tmp_path / "run").steps().is_empty()
    check(writer.ledger, 4)
    writer.close()
    check(open_ledger(tmp_path / "run"), 4)


def test_a_refusing_disk_is_not_asked_with_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", ["t"], flush_every=10)
    refused = 0
    with monkeypatch.context() as patch:
        refuse("replace", errno.ENOSPC)(patch)
        for step in range(20):  # three rows each
            try:
                fill(writer, range(step, step + 1))
            except StoreError:
                refused += 1
                # the step's account follows its values, which had been taken when the flush failed
                if len(writer.ledger.account()) == step:
                    writer.add_account(step, "t", 1.0, 0.0, 0.0, 1.0, 0.0)
    assert 3 <= refused <= 6
    writer.close()
    check(open_ledger(tmp_path / "run"), 20)


@pytest.mark.parametrize("at", ["before", "after"])
def test_an_interrupt_around_the_rename_neither_loses_nor_doubles_rows(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    fill(writer, range(3))
    replace = os.replace

    def interrupted(*args: Any) -> None:
        if at == "after":
            replace(*args)
        raise KeyboardInterrupt

    for count in range(6):  # header, values, account: each is interrupted at least once
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.flush()
        check(writer.ledger, 3 + count)
        fill(writer, range(3 + count, 4 + count))
    writer.close()
    check(writer.ledger, 9)
    check(open_ledger(tmp_path / "run"), 9)


def test_a_full_disk_keeps_info_and_tables_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", ["t"], info={"a": 1})
    writer.add_table("curve", pl.DataFrame({"x": [1]}))
    writer.flush()
    with monkeypatch.context() as patch:
        refuse("fsync", errno.ENOSPC)(patch)
        with pytest.raises(StoreError, match="free some space"):
            writer.update_info({"b": 2})
        writer.add_table("curve", pl.DataFrame({"x": [1, 2]}))
        with pytest.raises(StoreError, match="free some space"):
            writer.flush()
    assert open_ledger(tmp_path / "run").info == {"a": 1}
    assert open_ledger(tmp_path / "run").table("curve")["x"].to_list() == [1]
    assert writer.ledger.info == {"a": 1, "b": 2}
    writer.flush()
    assert open_ledger(tmp_path / "run").info == {"a": 1, "b": 2}
    assert open_ledger(tmp_path / "run").table("curve")["x"].to_list() == [1, 2]


def test_a_folder_that_is_deleted_meanwhile_is_named(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    fill(writer, range(2))
    writer.flush()
    ledger = writer.ledger
    kept = tmp_path / "kept"
    (tmp_path / "run").rename(kept)
    fill(writer, range(2, 3))
    with pytest.raises(StoreError, match="the folder was moved or deleted"):
        writer.flush()
    with pytest.raises(StoreError, match="part-000000"):
        ledger.values()
    kept.rename(tmp_path / "run")
    writer.close()
    check(open_ledger(tmp_path / "run"), 3)


def test_a_run_can_be_opened_at_every_instant_of_its_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    replace, looks = os.replace, 0

    def watched(*args: Any) -> None:
        nonlocal looks
        for act in (lambda: None, lambda: replace(*args)):
            act()
            if (out / "run.json").exists():
                ledger = open_ledger(out)
                ledger.values()
                assert all(len(ledger.table(name)) for name in ledger.tables)
                looks += 1

    monkeypatch.setattr(os, "replace", watched)
    writer = RunWriter(out, ["t"], flush_every=3)
    for step in range(5):
        fill(writer, range(step, step + 1))
        writer.add_table("curve", pl.DataFrame({"x": [step]}))
        writer.update_info({"step": step})
    writer.close()
    assert looks > 20


def test_a_folder_that_cannot_be_made_leaves_nothing_and_can_be_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse("fsync", errno.ENOSPC)(patch)
        with pytest.raises(StoreError, match=r"run\.json \(No space left on device\): free some space"):
            RunWriter(tmp_path / "run", ["t"])
    assert not list((tmp_path / "run").iterdir())
    writer = RunWriter(tmp_path / "run", ["t"])
    fill(writer, range(1))
    writer.close()
    check(open_ledger(tmp_path / "run"), 1)


def test_a_clock_that_jumps_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By years and in both directions; a run writes no time of day anywhere."""
    clocks = {name: iter([1e9, 2e9, -1e9, 0.0, 5e9] * 200) for name in ("time", "monotonic")}
    whole = RunWriter(tmp_path / "whole", ["t"])
    fill(whole, range(6))
    whole.close()
    with monkeypatch.context() as patch:
        for name, times in clocks.items():
            patch.setattr(f"time.{name}", lambda times=times: next(times))
        writer = RunWriter(tmp_path / "run", ["t"])
        for step in range(6):
            fill(writer, range(step, step + 1))
        writer.close()
    check(open_ledger(tmp_path / "run"), 6)
    assert open_ledger(tmp_path / "run").steps().equals(open_ledger(tmp_path / "whole").steps())
