"""Files that were torn, flipped, moved or made up: found before anything wrong is read from them."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from store.runs import check, fill

from assay.errors import AssayWarning, StoreError
from assay.store import RunWriter, open_ledger
from assay.store.header import checksum


@pytest.fixture
def run(tmp_path: Path) -> Path:
    writer = RunWriter(tmp_path / "run", ["t"], info={"a": 1})
    for step in range(3):
        fill(writer, range(step, step + 1))
        writer.add_metadata(pl.DataFrame({"id": [step], "domain": ["x"]}))
        writer.add_table("curve", pl.DataFrame({"x": [1.0]}))
        writer.flush()
    writer.close()
    return tmp_path / "run"


def every_answer(path: Path) -> list[Any]:
    ledger = open_ledger(path)
    frames = [ledger.values(), ledger.steps(), ledger.account(), ledger.metadata(), ledger.table("curve")]
    return [ledger.targets, ledger.info, *(frame.rows() for frame in frames)]


def test_a_flipped_bit_anywhere_in_any_file_is_found_before_it_is_read(run: Path) -> None:
    whole = every_answer(run)
    generator, messages = np.random.default_rng(0), []
    for file in [path for path in sorted(run.rglob("*")) if path.is_file()]:
        content = file.read_bytes()
        for at in generator.choice(len(content), size=40, replace=False):
            flipped = bytearray(content)
            flipped[at] ^= 1 << generator.integers(8)
            file.write_bytes(flipped)
            try:
                answer = every_answer(run)
            except StoreError as error:
                messages.append((str(file), str(error)))
            else:  # run.json has blanks that mean nothing
                assert file.name == "run.json"
                assert answer == whole
        file.write_bytes(content)
    assert every_answer(run) == whole
    assert len(messages) > 300
    assert all(file in message and "\n" not in message for file, message in messages)


@pytest.mark.parametrize("table", ["values", "account", "metadata", "tables"])
@pytest.mark.parametrize("left", [0, 7, -1])
def test_a_torn_part_is_named_and_can_be_moved_away(run: Path, table: str, left: int) -> None:
    part = sorted((run / table).iterdir())[0]
    part.write_bytes(part.read_bytes()[:left])
    with pytest.raises(StoreError) as raised:
        open_ledger(run)
    assert str(part) in str(raised.value)
    assert "is damaged" in str(raised.value)
    assert "move it out of the folder" in str(raised.value)
    part.rename(run.parent / "aside")
    if table == "tables":
        assert open_ledger(run).tables == []
    else:
        with pytest.warns(
            AssayWarning, match=f"1 of the 3 parts of .*{table} are missing, the first is number 0"
        ):
            ledger = open_ledger(run)
        assert len(ledger.steps()) == (4 if table == "values" else 6)


def test_a_missing_last_part_is_noticed_in_a_closed_run(run: Path) -> None:
    sorted((run / "values").iterdir())[-1].unlink()
    with pytest.warns(AssayWarning, match="the first is number 2"):
        open_ledger(run)


def test_a_copied_part_is_noticed(run: Path) -> None:
    part = sorted((run / "values").iterdir())[0]
    shutil.copy(part, part.with_name("part-000000-00000000.parquet"))
    with pytest.raises(StoreError, match="has the same number"):
        open_ledger(run)


def test_a_part_of_another_run_is_noticed(run: Path, tmp_path: Path) -> None:
    other = RunWriter(tmp_path / "other", ["u"])
    other.add_values(0, 0, ["a"], np.ones((1, 1)))
    other.add_metadata(pl.DataFrame({"id": ["a"]}))
    other.close()
    for table, says in (("values", "its columns are not those"), ("metadata", "its ids are not those")):
        stranger = shutil.copy(next((tmp_path / "other" / table).iterdir()), run / table / "x")
        crc = next((tmp_path / "other" / table).iterdir()).name.split("-")[2]
        Path(stranger).rename(run / table / f"part-000003-{crc}")
        with pytest.raises(StoreError, match=says):
            open_ledger(run)
        (run / table / f"part-000003-{crc}").unlink()


def test_a_missing_folder_is_named(run: Path) -> None:
    shutil.rmtree(run / "account")
    with pytest.raises(StoreError, match=r"cannot read .*account"):
        open_ledger(run)


def test_a_part_that_goes_bad_while_the_ledger_is_open_is_named(run: Path) -> None:
    ledger = open_ledger(run)
    part = sorted((run / "values").iterdir())[1]
    part.write_bytes(b"")
    with pytest.raises(StoreError, match=re.escape(part.name)):
        ledger.values()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h | {"version": 3}, "has format version 3, newer than this assay's 2: upgrade assay"),
        (lambda h: h | {"version": 10**30}, "newer than this assay's 2"),
        (lambda h: h | {"targets": ["t", "u"]}, "does not match its checksum"),
        (lambda h: {k: v for k, v in h.items() if k != "crc32"}, "does not match its checksum"),
        (lambda h: h | {"format": 3}, "is not that of a run"),
        (lambda h: [h], "is not that of a run"),
        (lambda h: None, "is not that of a run"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(run: Path, change: Callable[[Any], Any], says: str) -> None:
    header = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(change(header)))
    with pytest.raises(StoreError) as raised:
        open_ledger(run)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0}, {"version": True}, {"version": "1"}, {"version": None}, {"targets": "t"},
        {"targets": [1]},
        {"targets": ["t", "t"]}, {"targets": None}, {"ids": "float"}, {"ids": []}, {"ids": {}}, {"info": []},
        {"info": None}, {"parts": {"values": "3"}}, {"parts": []}, {"parts": {"values": math.inf}},
    ],
)  # fmt: skip
def test_a_header_with_a_valid_checksum_and_invalid_fields_is_refused(
    run: Path, change: dict[str, Any]
) -> None:
    fields = {k: v for k, v in json.loads((run / "run.json").read_text()).items() if k != "crc32"} | change
    (run / "run.json").write_text(json.dumps(fields | {"crc32": checksum(fields)}))
    with pytest.raises(StoreError, match="bad field"):
        open_ledger(run)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"1e999", b'{"a": 1}'])
def test_a_header_that_is_no_json_is_refused(run: Path, text: bytes) -> None:
    (run / "run.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"run\.json"):
        open_ledger(run)


def test_a_whole_run_opens_without_a_warning(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(open_ledger(run), 3)
