"""`assay select --data`: which column the ids come from, and what is said of the rows that were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from assay.store import RunWriter
from assay.train import content_id

TEXTS = [f"document number {n}" for n in range(8)]


def record(folder: Path, column: str | None) -> Path:
    """A run as `assay train` leaves it, of documents 0 to 5, the odd ones harmful; named by a column or by the text."""
    config = {"out": "unused", "data": {"path": str(folder / "mine.jsonl"), "id": column}}
    writer = RunWriter(folder / "run", ["t"], {"config": config})
    ids = [f"u{n}" if column else content_id(TEXTS[n]) for n in range(6)]
    writer.add_values(0, 0, ids, np.array([[1.0 if n % 2 == 0 else -0.5] for n in range(6)]))
    writer.close()
    rows = [{"url": f"u{n}", "text": text} for n, text in enumerate(TEXTS)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "run"


@pytest.mark.parametrize("column", ["url", None])
def test_the_ids_are_those_that_the_run_was_given(run: Any, tmp_path: Path, column: str | None) -> None:
    folder = record(tmp_path, column)
    status, out, err = run("select", folder, "--drop", "negative", "--data", tmp_path / "mine.jsonl")
    assert (status, err.count("error")) == (0, 0)
    kept = [
        json.loads(line)["url"] for line in (folder / "selection" / "data.jsonl").read_text().splitlines()
    ]
    assert kept == ["u0", "u2", "u4", "u6", "u7"]
    assert "data: kept 5 of 8 rows, dropped 3, the 2 that the run never saw among the kept\n" in out


def test_data_that_the_run_never_saw_at_all_is_a_mistake(run: Any, tmp_path: Path) -> None:
    folder = record(tmp_path, "url")
    pl.DataFrame({"key": ["u0"], "text": [TEXTS[0]]}).write_parquet(tmp_path / "other.parquet")
    status, out, err = run("select", folder, "--drop", "negative", "--data", tmp_path / "other.parquet")
    assert (status, out) == (1, "")
    assert "none of the data's 1 ids in \"hash of 'text'\" is one of the run's: name the column" in err
    assert not (folder / "selection").exists()
    status, out, _ = run(
        "select", folder, "--drop", "negative", "--data", tmp_path / "other.parquet", "--id", "key"
    )
    assert status == 0
    assert "data: kept 1 of 1 rows, dropped 0\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--id", "url"], "--id is that of --data"),
        (["--text", "text"], "--text is that of --data"),
        (["--per", "source", "--per-domain"], "--per source and --per-domain are two groupings"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    run: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, out, err = run("select", record(tmp_path, "url"), "--keep", "3", *arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err
