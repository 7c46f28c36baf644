"""`--out`: refused before the work where it cannot be written, and written as its name says."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from assay.cli.output import check_out, write_out
from assay.errors import InputError
from assay.store import RunWriter

SOURCES = {
    "day": [date(2024, 1, 1), date(2024, 1, 2)],
    "moment": [datetime(2024, 1, 1, 12), datetime(2024, 1, 2)],
    "price": [Decimal("1.50"), Decimal("2.25")],
    "raw": [b"\xffa", b"b"],
    "share": ["x", "y"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = RunWriter(tmp_path / "run", ["t"])
    writer.add_values(0, 0, [1, 2], np.array([[3.0], [1.0]]))
    writer.add_metadata(pl.DataFrame({"id": [1, 2], **SOURCES}))
    writer.close()
    return tmp_path / "run"


@pytest.mark.parametrize("by", SOURCES)
@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_sources_of_any_type_are_written(run: Any, folder: Path, by: str, ending: str) -> None:
    path = folder.parent / f"shares.{ending}"
    status, out, err = run("credit", folder, "--by", by, "-o", path)
    assert status == 0, err
    assert "75.0 %" in out
    if ending == "json":
        content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
        shares = [row["share"] for row in content["shares"]]
    else:
        frame = pl.read_csv(path) if ending == "csv" else pl.read_parquet(path)
        shares = frame["share"].to_list()
    assert shares == [0.75, 0.25]


@pytest.mark.parametrize(
    "command",
    [
        ["credit", "{run}", "--by", "day"],
        ["adjoint", "{run}"],
        ["influence", "{run}", "-q", "a text"],
        ["search", "{run}", "{run}", "-q", "a text"],
        ["evaluate", "{run}"],
    ],
    ids=lambda command: command[0],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    run: Any, folder: Path, command: list[str]
) -> None:
    words = [word.format(run=folder) for word in command]
    for out, message in (
        (folder / "none" / "a.json", f"there is no folder {folder / 'none'}: make it first"),
        (folder, "end its name in" if words[0] != "evaluate" else "is a folder"),
    ):
        status, said, err = run(*words, "--out", out)
        assert (status, said, err.count("\n")) == (1, "", 1)
        assert message in err


def test_a_folder_and_a_file_without_rights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_out(tmp_path / "a.json")
    check_out(tmp_path / "b.csv")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"b\.csv cannot be written \(Permission denied\)"):
        check_out(tmp_path / "b.csv")
    with pytest.raises(InputError, match=r"none/c\.csv cannot be written \(No such file"):
        write_out(tmp_path / "none" / "c.csv", pl.DataFrame({"x": [1]}))


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_query_is_refused(run: Any, folder: Path, query: str) -> None:
    status, out, err = run("search", folder, folder, "-q", query)
    assert (status, out) == (1, "")
    assert "holds no text: give at least two tokens" in err
