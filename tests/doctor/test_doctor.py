"""Whatever is torn, flipped, lost or left over: it is found, named, and what can be mended is."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from index import killed
from store.runs import check, fill

from assay.cli.app import main
from assay.doctor import examine
from assay.errors import AssayWarning, StoreError, UnreadableError
from assay.index import Index
from assay.rows import Folder
from assay.store import RunWriter, open_ledger
from assay.store.tensors import snapshot_files


def flip(path: Path, at: int = -20) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 8
    path.write_bytes(content)


def part(run: Path, table: str, number: int) -> Path:
    return next((run / table).glob(f"part-{number:06d}-*"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    writer = RunWriter(tmp_path / "run", ["t", "u v"], info={"a": 1})
    for step in range(3):
        writer.add_values(step, 0, [0, 1 + step], np.array([[1.0, 0.0], [step / 8, 0.0]]))
        writer.add_account(step, "t", 1.0, 0.0, 0.0, 1.0, 0.0)
        writer.add_metadata(pl.DataFrame({"id": [step], "domain": ["x"]}))
        writer.add_table("curve", pl.DataFrame({"x": [1.0]}))
        writer.flush()
    writer.close()
    return tmp_path / "run"


def test_a_whole_run_is_whole(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    diagnosis = examine(run)
    assert diagnosis.whole
    assert diagnosis.findings == ()
    assert diagnosis.rooms[0].contents == {"values": 6, "account": 3, "metadata": 3}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_every_file_that_is_flipped_is_named_and_can_be_mended(run: Path) -> None:
    files = sorted(path for path in run.rglob("*") if path.is_file())
    assert len(files) == 11
    for path in files:
        content = path.read_bytes()
        flip(path)
        diagnosis = examine(run)
        assert [finding.place for finding in diagnosis.findings if finding.state == "damaged"] == [path]
        path.write_bytes(content)
    assert examine(run).whole


def test_a_damaged_part_is_moved_aside_and_the_rest_opens(run: Path) -> None:
    torn = part(run, "values", 1)
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(StoreError, match=torn.name):
        open_ledger(run)
    mended = examine(run).mend()
    assert [finding.place for finding in mended] == [torn]
    assert (run / "damaged" / "values" / torn.name).stat().st_size == 100
    with pytest.warns(AssayWarning, match="the first is number 1"):
        assert open_ledger(run).steps("t")["step"].to_list() == [0, 0, 2, 2]
    after = examine(run)
    assert [(f.place.name, f.state) for f in after.findings] == [("part-000001", "missing")]
    assert not after.whole  # lost rows stay lost, and are said to be, every time
    assert after.mend() == []


@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_header_is_written_anew_from_the_values(run: Path, lost: bool) -> None:
    values = open_ledger(run).steps("u v")
    if lost:
        (run / "run.json").unlink()
    else:
        flip(run / "run.json")
    examine(run).mend()
    ledger = open_ledger(run)
    assert ledger.targets == ["t", "u v"]
    assert ledger.info == {"recovered": True}
    assert ledger.steps("u v").equals(values)
    assert examine(run).whole
    assert (run / "damaged" / "run.json").exists() != lost


def test_the_header_of_a_resumed_run_is_not_made_up(tmp_path: Path) -> None:
    for resume in (None, 1):
        writer = RunWriter(tmp_path / "run", ["t"], resume=resume)
        fill(writer, range(resume or 0, 3))
        writer.close()
    check(open_ledger(tmp_path / "run"), 3)
    flip(tmp_path / "run" / "run.json")
    (finding,) = examine(tmp_path / "run").findings
    assert "was resumed" in finding.detail
    assert finding.mend is None


def test_a_damaged_snapshot_is_moved_aside(run: Path) -> None:
    files = snapshot_files(run)
    for number in (0, 5):
        files.write("state", number, {"w": torch.ones(3)})
    (torn,) = (run / "snapshots").glob("state-000000005-*")
    flip(torn)
    assert [f.place for f in examine(run).findings] == [torn]
    examine(run).mend()
    assert examine(run).whole
    assert files.numbers("state") == [0]


def withhold(monkeypatch: pytest.MonkeyPatch, wanted: Path, number: int) -> None:
    """The system hands a file or a folder over no more; root would be allowed to read whatever its rights are."""

    def refusing(original: Callable[..., object]) -> Callable[..., object]:
        def refuse(path: object, *arguments: object, **options: object) -> object:
            if isinstance(path, str | Path) and Path(path) == wanted:
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *arguments, **options)

        return refuse

    for module, name in ((builtins, "open"), (io, "open"), (os, "scandir"), (os, "listdir")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.EACCES, "check its rights"), (errno.EIO, "check that disk")]
)
def test_what_cannot_be_read_is_no_damage_and_stays_where_it_is(
    run: Path, number: int, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_files(run).write("state", 0, {"w": torch.ones(3)})
    files = sorted(path for path in run.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    for path in [*files, run / "values"]:
        with monkeypatch.context() as patched:
            withhold(patched, path, number)
            diagnosis = examine(run)
            assert [(f.place, f.state) for f in diagnosis.findings] == [(path, "unreadable")]
            assert f"could not be read ({os.strerror(number)}): {cure}" in diagnosis.findings[0].detail
            assert not diagnosis.whole
            assert diagnosis.mend() == []
            if path.parent != run / "snapshots" and path != run / "values":
                with pytest.raises(UnreadableError, match="could not be read"):
                    open_ledger(run)
    assert {path: path.read_bytes() for path in files} == before


def test_a_header_is_not_made_up_while_values_cannot_be_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(run / "run.json")
    withhold(monkeypatch, part(run, "values", 1), errno.EACCES)
    findings = examine(run).findings
    assert [f.state for f in findings] == ["damaged", "unreadable"]
    assert "once all values can be read" in findings[0].detail
    assert all(f.mend is None for f in findings)


def test_rows_that_a_store_does_not_hand_over_are_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed.build(tmp_path, "random")
    original = Folder.read_array, Folder.open_array

    def refuse(self: Folder, name: str) -> object:
        if name in ("data", "curvature/squares"):
            raise self.refused("read", name, ValueError("PERMISSION_DENIED: Error opening file"))
        return original[1](self, name)

    monkeypatch.setattr(Folder, "read_array", refuse)
    monkeypatch.setattr(Folder, "open_array", refuse)
    findings = examine(tmp_path).findings
    assert [(f.place.name, f.state) for f in findings] == [
        ("curvature", "unreadable"),
        ("rows", "unreadable"),
    ]
    assert "20 rows from row 0 on" in findings[1].detail
    assert all(f.mend is None for f in findings)


def test_what_a_killed_writer_left_is_removed(run: Path) -> None:
    (run / "values" / "part-000003-00000000.parquet.tmp").write_bytes(b"half")
    diagnosis = examine(run)
    assert diagnosis.whole
    assert [finding.state for finding in diagnosis.findings] == ["left over"]
    diagnosis.mend()
    assert examine(run).findings == ()


def test_a_lost_table_and_a_foreign_part_are_named(run: Path, tmp_path: Path) -> None:
    other = RunWriter(tmp_path / "other", ["t"])
    fill(other, range(1))
    other.close()
    check(open_ledger(tmp_path / "other"), 1)
    foreign = part(tmp_path / "other", "values", 0)
    foreign.rename(run / "values" / foreign.name)
    assert [f.detail.split(":")[0] for f in examine(run).findings] == ["two different parts have this number"]
    (run / "tables" / next((run / "tables").iterdir()).name).unlink()
    (run / "tables").rmdir()
    assert [f.state for f in examine(run).findings] == ["damaged", "missing"]


@pytest.mark.parametrize(
    "where", ["rows/data/c/1/0", "rows/scales/c/1/0", "rows/table"], ids=["data", "scales", "table"]
)
def test_a_damaged_index_goes_back_to_what_is_whole_and_builds_on(where: str, tmp_path: Path) -> None:
    out = tmp_path / "index"
    killed.build(out, "random")
    whole = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    assert examine(out).whole
    path = part(out, "rows/table", 1) if where.endswith("table") else out / where
    flip(path, 3)
    diagnosis = examine(out)
    assert [(f.place, f.state) for f in diagnosis.findings] == [(out / "rows", "damaged")]
    assert "13 of 20 rows, from row 7 on" in diagnosis.findings[0].detail
    diagnosis.mend()
    assert examine(out).whole or where.endswith("table")  # the part itself is now left over
    examine(out).mend()
    killed.build(out, "random")
    assert {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == whole


def test_damaged_curvature_is_formed_again_from_the_rows(tmp_path: Path) -> None:
    killed.build(tmp_path, "random")
    before = (tmp_path / "curvature/squares/c/0").read_bytes()
    flip(tmp_path / "curvature/squares/c/0", 3)
    diagnosis = examine(tmp_path)
    assert [f.place.name for f in diagnosis.findings] == ["curvature"]
    diagnosis.mend()
    killed.build(tmp_path, "random")
    assert (tmp_path / "curvature/squares/c/0").read_bytes() == before
    assert len(Index.open(tmp_path)) == 20


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()], ids=["no folder", "empty"])
def test_nothing_of_assays(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(StoreError, match="there is n"):
        examine(tmp_path / "x")


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def status(*arguments: str) -> int:
        with pytest.raises(SystemExit) as exited:
            main(["doctor", str(run), *arguments])
        return int(exited.value.code or 0)

    assert status() == 0
    assert capsys.readouterr().out.endswith("whole\n")
    flip(run / "run.json")
    assert status() == 1
    assert "--repair would write it anew" in capsys.readouterr().out
    assert status("--repair") == 0
    assert "mended" in capsys.readouterr().out


def test_a_run_without_a_single_row_is_said_to_be_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    assert examine(tmp_path / "run").rooms[0].note == "nothing was recorded yet"
    writer.close()
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path / "run")])
    assert capsys.readouterr().out.splitlines() == [
        f"run {tmp_path / 'run'}: 0 values, 0 account, 0 metadata; nothing was recorded",
        "whole",
    ]
