"""Whatever is recorded and whenever it is flushed, disk and memory say what a plain dictionary says."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from assay.store import Ledger, RunWriter, open_ledger

TARGETS = ["code", "law"]
# Eighths of small whole numbers add up without rounding, so the sums must agree to the last bit.
exact = st.integers(-800, 800).map(lambda eighths: eighths / 8)
value = st.one_of(exact, exact, exact, st.just(math.nan))


def batches(ids: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    rows = st.lists(st.tuples(ids, value, value), max_size=5)
    add = st.tuples(st.just("values"), st.integers(0, 3), st.integers(0, 2), rows)
    account = st.tuples(st.just("account"), st.integers(0, 3), st.sampled_from(TARGETS), exact)
    metadata = st.tuples(
        st.just("metadata"), st.dictionaries(ids, st.sampled_from(["x", "y", None]), min_size=1, max_size=4)
    )
    return st.lists(st.one_of(add, add, account, metadata, st.just(("flush",))), max_size=25)


streams = st.one_of(batches(st.integers(-3, 5)), batches(st.text("ab日", max_size=2)))


def record(out: Path | None, stream: list[Any], flush_every: int) -> RunWriter:
    writer = RunWriter(out, TARGETS, flush_every=flush_every)
    for kind, *what in stream:
        if kind == "values":
            step, micro, rows = what
            values = np.array([row[1:] for row in rows]).reshape(len(rows), 2)
            writer.add_values(step, micro, [row[0] for row in rows], values)
        elif kind == "account":
            step, target, number = what
            writer.add_account(step, target, number, 0.0, 0.5, number + 1, 0.5)
        elif kind == "metadata":
            writer.add_metadata(
                pl.DataFrame(
                    {"id": list(what[0]), "domain": list(what[0].values())},
                    schema_overrides={"domain": pl.String},
                )
            )
        else:
            writer.flush()
    return writer


def added_up(stream: list[Any], target: int) -> list[tuple[Any, float, int]]:
    sums: dict[Any, float] = {}
    steps: dict[Any, set[int]] = {}
    for kind, *what in stream:
        if kind == "values":
            for row in what[2]:
                sums[row[0]] = sums.get(row[0], 0.0) + (
                    0.0 if math.isnan(row[1 + target]) else row[1 + target]
                )
                steps.setdefault(row[0], set()).add(what[0])
    return sorted(((i, sums[i], len(steps[i])) for i in sums), key=lambda row: (-row[1], row[0]))


def grouped(stream: list[Any]) -> dict[str | None, tuple[float, int, float]]:
    domain: dict[Any, str] = {}
    for kind, *what in stream:
        if kind == "metadata":
            domain |= {key: name for key, name in what[0].items() if name is not None}
    groups: dict[str | None, list[float]] = {}
    for key, total, _ in added_up(stream, 0):
        groups.setdefault(domain.get(key), []).append(total)
    return {
        name: (sum(totals), len(totals), sum(total < 0 for total in totals) / len(totals))
        for name, totals in groups.items()
    }


def answers(ledger: Ledger, has_metadata: bool) -> dict[str, pl.DataFrame]:
    found = {
        f"{name} {target}": getattr(ledger, name)(target)
        for name in ("values", "steps", "account")
        for target in TARGETS
    }
    if has_metadata:
        found["metadata"] = ledger.metadata()
        found["by"] = ledger.by("domain", "code")
    return found


@given(streams, st.sampled_from([1, 3, 1000]))
def test_every_way_of_keeping_a_run_gives_the_same_answers(stream: list[Any], flush_every: int) -> None:
    has_metadata = any(entry[0] == "metadata" for entry in stream)
    memory = answers(record(None, stream, 1000).ledger, has_metadata)
    with tempfile.TemporaryDirectory() as folder:
        writer = record(Path(folder) / "run", stream, flush_every)
        ways = {"memory, flushed": answers(record(None, stream, flush_every).ledger, has_metadata)}
        ways["disk, open"] = answers(writer.ledger, has_metadata)
        writer.close()
        ways["disk, closed"] = answers(writer.ledger, has_metadata)
        ways["disk, reopened"] = answers(open_ledger(Path(folder) / "run"), has_metadata)
    for target, name in enumerate(TARGETS):
        assert memory[f"values {name}"].rows() == added_up(stream, target)
    if has_metadata:
        rows = {row[0]: row[1:4] for row in memory["by"].rows()}
        assert rows == grouped(stream)
    for found in ways.values():
        for name, frame in memory.items():
            assert_frame_equal(found[name], frame, check_exact=True)


FRAMES = {
    "numbers": pl.DataFrame(
        {"u8": pl.Series([1, None], dtype=pl.UInt8), "f32": pl.Series([1.5, math.nan], dtype=pl.Float32)}
    ),
    "text": pl.DataFrame(
        {"text": ["<b>\x00日本", None], "kind": pl.Series(["a", "b"], dtype=pl.Categorical)}
    ),
    "enum": pl.DataFrame({"e": pl.Series(["a", "b"], dtype=pl.Enum(["b", "a"]))}),
    "time": pl.DataFrame(
        {"t": pl.datetime_range(pl.datetime(2020, 1, 1), pl.datetime(2020, 1, 2), eager=True)}
    ),
    "nested": pl.DataFrame({"list": [[1], []], "struct": [{"a": 1}, {"a": None}]}),
    "bytes": pl.DataFrame({"b": [b"\x00\xff", None], "empty": [None, None]}),
    "no rows": pl.DataFrame(schema={"x": pl.Int32}),
    "no columns": pl.DataFrame(),
}


@pytest.mark.parametrize("name", FRAMES)
def test_tables_of_every_type_come_back_the_same(name: str, tmp_path: Path) -> None:
    frame = FRAMES[name]
    writer = RunWriter(tmp_path / "run", ["t"])
    writer.add_table("table", frame)
    with_id = frame.with_columns(id=pl.int_range(pl.len(), dtype=pl.Int64))
    writer.add_metadata(with_id)
    writer.close()
    ledger = open_ledger(tmp_path / "run")
    assert_frame_equal(ledger.table("table"), frame)
    if len(with_id):
        assert_frame_equal(ledger.metadata(), with_id)
    assert_frame_equal(writer.ledger.table("table"), frame)


@pytest.mark.parametrize("name", ["lr=0.1", "[a]*?", "with space", "日本", "a%20b", "x.parquet"])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    out = tmp_path / name / "run"
    writer = RunWriter(out, ["t"], flush_every=1)
    for step in range(3):
        writer.add_values(step, 0, [step], np.ones((1, 1)))
    writer.add_table("t", pl.DataFrame({"x": [1]}))
    writer.close()
    ledger = open_ledger(out)
    assert ledger.steps().columns == ["step", "id", "value"]
    assert ledger.values()["id"].to_list() == [0, 1, 2]
    assert ledger.table("t").columns == ["x"]


def test_rows_reach_the_disk_after_so_many_or_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    writer = RunWriter(tmp_path / "run", ["t"], flush_every=4, flush_seconds=10)

    def on_disk() -> int:
        return len(open_ledger(tmp_path / "run").steps())

    for expected in (0, 0, 0, 4, 4):
        writer.add_values(0, 0, [1], np.ones((1, 1)))
        assert on_disk() == expected
    now = 9.0
    writer.add_values(0, 0, [1], np.ones((1, 1)))
    assert on_disk() == 4
    now = 10.0
    writer.add_account(0, "t", 0, 0, 0, 0, 0)
    assert on_disk() == 6
    now = 19.0
    writer.add_values(0, 0, [1], np.ones((1, 1)))
    assert on_disk() == 6
