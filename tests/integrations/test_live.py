"""The running sums of a logger against one loop over all rows, bit for bit, and what is read for them."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from assay.errors import StoreError
from assay.integrations.live import LiveValues
from assay.store import Ledger, RunWriter, files

GROUPS = {n: "abcdefg"[n % 7] for n in range(40)}  # ids from 40 on have none
TARGETS = ["first", "second"]


def live_on(writer: RunWriter) -> LiveValues:
    """As on a run whose values go to the writer."""

    class Watched:
        ledger = property(lambda self: writer.ledger)

        def status(self) -> Any:
            return SimpleNamespace(explained={}, seconds=0.0)

    run: Any = Watched()
    run.writer = writer
    return LiveValues(run)


def added(writer: RunWriter, steps: range, seed: int = 0) -> None:
    """Two micro-batches per step, values of very unequal size, some of them not finite."""
    for step in steps:
        draw = np.random.default_rng([seed, step])
        for micro in range(2):
            values = draw.normal(size=(9, 2)) * 10.0 ** draw.integers(-9, 9, size=(9, 2))
            values[draw.random((9, 2)) < 0.05] = np.nan
            writer.add_values(step, micro, draw.integers(0, 45, 9), values)


def one_loop(ledger: Ledger) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for target in ledger.targets:
        for _, id_, value in ledger.steps(target).iter_rows():
            if math.isfinite(value):
                found[f"assay/value/{target}/{GROUPS.get(id_, '(none)')}"] += value
    return found


def seen(live: LiveValues) -> dict[str, float]:
    return {name: number for name, number in live.read(GROUPS).items() if "/value/" in name}


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_however_often_one_looks_the_sums_are_those_of_one_loop(where: str, tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run" if where == "disk" else None, TARGETS)
    live, draw = live_on(writer), np.random.default_rng(5)
    for step in range(60):
        added(writer, range(step, step + 1))
        if draw.random() < 0.3:
            writer.flush()
        if draw.random() < 0.5:
            assert seen(live) == one_loop(writer.ledger)
    writer.close()
    assert seen(live) == seen(live) == seen(live_on(writer)) == one_loop(writer.ledger)
    assert len(one_loop(writer.ledger)) == 16


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", TARGETS)
    live = live_on(writer)
    added(writer, range(3))
    writer.flush()
    added(writer, range(3, 4))
    seen(live)
    for path in (tmp_path / "run" / "values").iterdir():
        path.rename(tmp_path / path.name)  # whoever opens it now fails
    added(writer, range(4, 6))
    writer.flush()
    added(writer, range(6, 7))
    found = seen(live)
    for path in tmp_path.glob("part-*"):
        path.rename(tmp_path / "run" / "values" / path.name)
    assert found == one_loop(writer.ledger)


def test_nothing_counts_twice_where_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", TARGETS)
    live = live_on(writer)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in range(8):
        added(writer, range(2 * step, 2 * step + 1))
        if step % 3 == 1:
            with monkeypatch.context() as full:
                full.setattr(files.os, "replace", refuse)
                with pytest.raises(StoreError, match="free some space"):
                    writer.flush()
        if step % 3 == 0:
            writer.flush()
        assert seen(live) == one_loop(writer.ledger)
        added(writer, range(2 * step + 1, 2 * step + 2))
        assert seen(live) == one_loop(writer.ledger)


def test_a_resumed_run_counts_what_was_not_overruled(tmp_path: Path) -> None:
    first = RunWriter(tmp_path / "run", TARGETS)
    for step in range(6):
        added(first, range(step, step + 1))
        first.flush()
    first.close()
    for resumed, until in ((4, 7), (3, 5)):  # the second time parts are cut that were cut before
        writer = RunWriter(tmp_path / "run", TARGETS, resume=resumed)
        live = live_on(writer)
        for step in range(resumed, until):
            added(writer, range(step, step + 1))
            if step % 2:
                writer.flush()
            assert seen(live) == one_loop(writer.ledger)
        writer.close()
        assert seen(live) == one_loop(writer.ledger)
