"""Side tables that grow with the steps: the curve, the points of the quadrature, the ages of gradients."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from store.runs import check, fill

import assay
from assay.doctor import examine
from assay.errors import InputError, StoreError
from assay.methods.booking import Aged, Booking, Books
from assay.store import RunWriter, files, open_ledger, shard_of


def rows_written(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """By folder of the run, the rows of every file that is written from now on."""
    found: dict[str, list[int]] = {}
    write = files.write_atomic

    def counted(path: Path, data: Any) -> None:
        write(path, data)
        if path.suffix == ".parquet":
            found.setdefault(path.parent.name, []).append(pl.read_parquet(path).height)

    monkeypatch.setattr(files, "write_atomic", counted)
    return found


def booking(step: int) -> Booking:
    one = torch.ones(1)
    aged = Aged(2, [one[:, None]], [2 * one[:, None]])
    return Booking(step, one, torch.zeros(()), points=3, seconds=0.5, after=0 * one, aged=aged)


def test_a_flush_writes_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    books = Books(writer, ["t"], (0.8, 1.25), "simpson")
    written = rows_written(monkeypatch)
    for first in range(0, 40, 10):
        books.write([booking(step) for step in range(first, first + 10)])
        writer.flush()
    assert written["account"] == written["quadrature"] == written["refresh"] == [10] * 4
    assert "tables" not in written
    ledger = open_ledger(tmp_path / "run")
    assert ledger.tables == ["quadrature", "refresh"]
    assert ledger.table("quadrature").rows() == [(step, 3, True, 0.5) for step in range(40)]
    assert ledger.table("refresh").rows() == [(step, "t", 2, 1.0, 2.0, 1.0) for step in range(40)]


def test_nothing_of_a_run_is_kept_once_it_is_written(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = assay.Run(model, optimizer, out=tmp_path / "run", snapshots=1000)
    for step in range(5):
        run.log({"loss": step})
        run.state_dict()
        assert run.writer._recording.waiting == 0
    run.log({"loss": 5.0})
    assert run.ledger.table("curve")["loss"].to_list() == [0, 1, 2, 3, 4, 5]
    run.close()
    run.log({"loss": 6.0})  # a logger's last word comes after the end
    parts = sorted((tmp_path / "run" / "curve").iterdir())
    assert [pl.read_parquet(part)["loss"].to_list() for part in parts] == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_column_may_come_late(where: str, tmp_path: Path) -> None:
    """A validation loss that is logged every few hundred steps."""
    writer = RunWriter(tmp_path / "run" if where == "disk" else None, ["t"])
    for step in range(300):
        writer.add_step(
            "curve", float(step), {"loss": 1.0} | ({"validation": 2.0} if step % 150 == 149 else {})
        )
        if step == 9:
            writer.flush()
    writer.close()
    ledger = writer.ledger if where == "memory" else open_ledger(tmp_path / "run")
    found = ledger.table("curve")
    assert found.columns == ["step", "loss", "validation"]
    assert found["step"].to_list() == list(range(300))
    assert found.drop_nulls()["step"].to_list() == [149, 299]
    ledger.verify()
    if where == "disk":
        diagnosis = examine(tmp_path / "run")
        assert diagnosis.whole
        assert diagnosis.rooms[0].contents["curve"] == 300


def test_a_run_that_goes_on_overrules_rows(tmp_path: Path) -> None:
    for start, factor in ((0, 1.0), (3, 10.0), (5, 100.0)):
        writer = RunWriter(tmp_path / "run", ["t"], resume=start)
        for step in range(start, 8):
            writer.add_step("curve", float(step), {"loss": factor * step})
            writer.flush()
        writer.close()
        assert writer.ledger.table("curve").equals(open_ledger(tmp_path / "run").table("curve"))
    assert writer.ledger.table("curve")["loss"].to_list() == [0, 1, 2, 30, 40, 500, 600, 700]


def test_a_run_that_kept_them_as_a_whole_is_read_and_gone_on_with(tmp_path: Path) -> None:
    """An older assay wrote such a table anew at every flush, and without the seconds at first."""
    before = RunWriter(tmp_path / "run", ["t"])
    before.add_table("quadrature", pl.DataFrame({"step": range(6), "points": [2] * 6, "met": [True] * 6}))
    before.close()
    assert open_ledger(tmp_path / "run").table("quadrature").height == 6
    after = RunWriter(tmp_path / "run", ["t"], resume=4)
    for step in (4, 5):
        after.add_step("quadrature", step, {"points": 3, "met": True, "seconds": 0.5})
        found = after.ledger.table("quadrature")
        assert found["step"].to_list() == list(range(step + 1))
        after.flush()
        assert open_ledger(tmp_path / "run").table("quadrature").equals(found)
    assert found["points"].to_list() == [2, 2, 2, 2, 3, 3]
    assert found["seconds"].to_list() == [None] * 4 + [0.5] * 2


def test_rows_that_all_processes_record_count_once(tmp_path: Path) -> None:
    for rank in range(2):
        info = {"processes": {"size": 2}}
        writer = RunWriter(shard_of(tmp_path / "run", rank), ["t"], info)
        fill(writer, range(2))
        writer.add_step("quadrature", 0, {"points": 3, "met": True, "seconds": float(rank)})
        writer.close()
    assert open_ledger(tmp_path / "run").table("quadrature").rows() == [(0, 3, True, 0.0)]


def test_a_disk_that_refuses_their_folder_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    fill(writer, range(2))

    def refuse(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        for step in range(2):
            writer.add_step("curve", float(step), {"loss": 1.0})
        with pytest.raises(StoreError, match="free some space"):
            writer.flush()
        assert writer.ledger.table("curve").height == 2
    writer.close()
    check(open_ledger(tmp_path / "run"), 2)
    assert open_ledger(tmp_path / "run").table("curve").height == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["parts"]["curve"] == 1


def test_they_are_not_replaced() -> None:
    writer = RunWriter(None, ["t"])
    writer.add_table("curve", pl.DataFrame({"step": [0.0], "loss": [1.0]}))
    writer.add_step("curve", 1.0, {"loss": 2.0})
    assert writer.ledger.table("curve")["loss"].to_list() == [1.0, 2.0]
    with pytest.raises(InputError, match="table 'curve' grows row by row in this run"):
        writer.add_table("curve", pl.DataFrame({"step": [0.0]}))
