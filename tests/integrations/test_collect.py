"""What is known of samples, on its way to the run: when it gets there, of which type, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import assay
from assay.errors import InputError, StoreError
from assay.integrations import collect
from assay.integrations.collect import Notes, Taken
from assay.store import RunWriter, files, shard_of


def taken(ids: list[Any], column: list[Any] | None = None, packed: Any = ()) -> Taken:
    rows = [{"id": id_, "x": x} for id_, x in zip(ids, column or [], strict=False)]
    return Taken(ids, rows, list(packed))


def noting(writer: RunWriter, **options: Any) -> Notes:
    notes = Notes(**options)
    writer.before_flush(lambda: notes.hand_over(writer))
    return notes


def parts(folder: Path) -> list[int]:
    """How many rows each part of a table has."""
    return [len(pl.read_parquet(path)) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("refused", ["values", "account"])
def test_values_on_the_disk_have_their_metadata_there(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a flush has come no further than to one of its files."""
    writer = RunWriter(tmp_path / "run", ["t"], flush_every=4)
    notes = noting(writer)

    def record(step: int) -> None:
        notes.add(taken([2 * step, 2 * step + 1], ["a", "b"], [(2 * step, "one", 3)]), step)
        writer.add_account(step, "t", 0, 0, 0, 0, 0)
        writer.add_values(step, 0, [2 * step, 2 * step + 1], np.ones((2, 1)))

    def write(path: Path, data: Any, write: Any = files.write_atomic) -> None:
        if path.parent.name == refused:
            raise StoreError("the disk is full")
        write(path, data)

    for step in range(5):
        record(step)
    monkeypatch.setattr(files, "write_atomic", write)
    with pytest.raises(StoreError):
        record(5)
    ledger = assay.open(tmp_path / "run")
    valued = set(ledger.values()["id"])
    assert len(valued) >= 8
    assert valued <= set(ledger.metadata()["id"])
    assert {id_ for id_ in valued if id_ % 2 == 0} <= set(ledger.table("packed")["id"])


def test_each_row_is_written_once_however_often_it_is_seen(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    notes = noting(writer)
    for epoch in range(3):
        for n in range(4):
            notes.add(taken([n], ["text"], [(n, "one", 3), (n, "two", 4 + n), (n, "one", 3)]), 4 * epoch + n)
            writer.add_values(4 * epoch + n, 0, [n], np.ones((1, 1)))
            writer.flush()
    writer.close()
    assert parts(tmp_path / "run" / "metadata") == parts(tmp_path / "run" / "packed") == [1, 1, 1, 1]
    packed = assay.open(tmp_path / "run").table("packed")
    assert packed.rows() == [
        row for n in range(4) for row in [(n, "one", 3), (n, "two", 4 + n), (n, "one", 3)]
    ]
    assert assay.open(tmp_path / "run").tables == ["packed"]


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "WAITING", 10_000)
    notes, writer = Notes(), RunWriter(None, ["t"])
    for n in range(7):
        assert not notes.full
        notes.add(taken([n], ["x" * 1000]))
    notes.add(taken([9], ["y"], [(9, "z", 3)] * 100))
    assert notes.full
    notes.hand_over(writer)
    assert not notes.full
    assert writer.ledger.metadata().height == 8


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ([0.5, 1], [0.5, 1.0]),
        ([None, 1, "a"], [None, "1", "a"]),
        ([[], ["a"], None], [[], ["a"], None]),
        ([{"a": None}, {"a": 1, "b": "c"}], [{"a": None, "b": None}, {"a": 1, "b": "c"}]),
    ],
)
def test_the_types_of_columns_do_not_depend_on_when_they_are_handed_over(
    values: list[Any], found: list[Any], tmp_path: Path
) -> None:
    for name, often in (("once", False), ("often", True)):
        writer = RunWriter(tmp_path / name, ["t"])
        notes = noting(writer)
        for n, value in enumerate(values):
            notes.add(taken([n], [value]))
            if often:
                writer.flush()
        writer.close()
        for ledger in (writer.ledger, assay.open(tmp_path / name)):
            assert ledger.metadata().sort("id")["x"].to_list() == found


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([["a"], "a"], r"'x' was List\(String\) and is now String"),
        ([{"a": [1]}, {"a": "b"}], r"'x' was Struct.* and is now Struct"),
        ([2**100], "Int128"),
        ([object()], "cast it or drop it"),
    ],
)
def test_metadata_that_cannot_be_kept_do_not_stand_in_the_way_of_values(
    values: list[Any], says: str, tmp_path: Path
) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    notes = noting(writer)
    for n, value in enumerate(values):
        notes.add(taken([n], [value], [(n, "one", 3)]))
        writer.add_values(n, 0, [n], np.ones((1, 1)))
        writer.flush()
    with pytest.raises(InputError, match=says):
        notes.add(taken([9], [values[0]]))
    notes.check()  # it is told once
    writer.close()
    ledger = assay.open(tmp_path / "run")
    assert ledger.values().height == ledger.table("packed").height == len(values)
    assert ledger.metadata().height == len(values) - 1


def test_values_of_one_batch_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    notes, writer = Notes(), RunWriter(None, ["t"])
    notes.add(taken([1, 2], [["a"], "a"]))
    notes.hand_over(writer)
    with pytest.raises(
        InputError, match=r"column 'x' of the training data .*list, str.*leave it out of columns"
    ):
        notes.check()


def test_an_interrupt_loses_nothing() -> None:
    notes, writer = Notes(), RunWriter(None, ["t"])
    notes.add(taken([1], ["a"], [(1, "one", 3)]))
    add = writer.add_metadata

    def interrupted(*args: Any, **more: Any) -> None:
        add(*args, **more)
        raise KeyboardInterrupt

    writer.add_metadata = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        notes.hand_over(writer)
    writer.add_metadata = add  # type: ignore[method-assign]
    notes.hand_over(writer)
    assert writer.ledger.metadata().rows() == [(1, "a")]
    assert writer.ledger.table("packed").rows() == [(1, "one", 3)]


def test_packed_rows_of_all_processes_and_of_a_resumed_run(tmp_path: Path) -> None:
    info = {"processes": {"kind": "ddp", "size": 2}}

    def record(rank: int, steps: range, resume: int | None = None) -> None:
        writer = RunWriter(shard_of(tmp_path / "run", rank), ["t"], info, resume=resume)
        notes = noting(writer)
        for step in steps:
            id_ = f"{rank}-{step // 2}"  # every sample comes in two steps
            notes.add(taken([id_], ["x"], [(id_, "one", 3), (id_, f"of {resume}", 4)]), step)
            writer.add_values(step, 0, [id_], np.ones((1, 1)))
        writer.flush()
        writer._recording.release()  # as if the process had been killed

    for rank in range(2):
        record(rank, range(8))
    for rank in range(2):
        record(rank, range(5, 7), resume=5)
    ledger = assay.open(tmp_path / "run")
    found = {id_: document for id_, document, _ in ledger.table("packed").iter_rows() if document != "one"}
    assert found == {f"{r}-{n}": "of None" if n < 2 else "of 5" for r in range(2) for n in range(4)}
    assert ledger.table("packed").height == 16
    assert set(found) == set(ledger.values()["id"]) == set(ledger.metadata()["id"])
