"""Where a run can be recorded and what can be opened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from store.runs import check, fill

from assay.errors import StoreError
from assay.store import RunWriter, open_ledger


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    fill(writer, range(2))
    for _ in range(2):
        with pytest.raises(StoreError) as raised:
            RunWriter(tmp_path / "run", ["other"])
        assert str(tmp_path / "run") in str(raised.value)
        assert "choose another out=, or delete that folder" in str(raised.value)
        writer.close()
    check(open_ledger(tmp_path / "run"), 2)


def test_other_files_in_the_folder_stay_and_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1")
    writer = RunWriter(tmp_path, ["t"])
    fill(writer, range(2))
    writer.close()
    for name in (
        "values/part-000009-00000000.parquet.tmp",
        "values/notes.txt",
        "tables/x.parquet",
        ".DS_Store",
    ):
        (tmp_path / name).write_text("no part")
    check(open_ledger(tmp_path), 2)
    assert (tmp_path / "config.yaml").read_text() == "a: 1"


def test_of_two_writers_that_start_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, started = Path.mkdir, []

    def racing(self: Path, *args: Any, **options: Any) -> None:
        if (
            self.name == "values" and not started
        ):  # the other one comes in between the look and the first folder
            started.append(True)
            started.append(RunWriter(self.parent, ["first"]))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", racing)
    with pytest.raises(StoreError, match="already holds a run"):
        RunWriter(tmp_path / "run", ["second"])
    assert open_ledger(tmp_path / "run").targets == ["first"]


WRITES = """
import sys
from assay.store import RunWriter
writer = RunWriter(sys.argv[1], ["t"], resume=None if sys.argv[2] == "new" else 0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("begins", ["new", "resumed"])
def test_a_second_process_is_refused_until_the_first_has_ended(begins: str, tmp_path: Path) -> None:
    if begins == "resumed":
        RunWriter(tmp_path / "run", ["t"]).close()
    command = [sys.executable, "-c", WRITES, str(tmp_path / "run"), begins]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(StoreError, match=r"another process writes into .*run: end it first"):
            RunWriter(tmp_path / "run", ["t"], resume=0)
        open_ledger(tmp_path / "run")  # reading is free
        other.kill()
    writer = RunWriter(tmp_path / "run", ["t"], resume=0)
    fill(writer, range(2))
    writer.close()
    check(open_ledger(tmp_path / "run"), 2)


def test_a_child_does_not_keep_the_folder_of_a_process_that_was_killed(tmp_path: Path) -> None:
    """Workers that load data are forked, and may outlive the training process."""
    code = WRITES.replace(
        'print("ready"', "import os, time\nchild = os.fork()\nif not child: time.sleep(100)\nprint(child"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), "new"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        other.kill()
        try:
            other.wait()
            RunWriter(tmp_path / "run", ["t"], resume=0).close()
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("folders", [["values"], ["values", "account", "metadata", "tables"]])
def test_a_writer_that_died_while_it_began_is_in_nobodys_way(folders: list[str], tmp_path: Path) -> None:
    for name in folders:
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "run.json.tmp").write_text("{")
    writer = RunWriter(tmp_path / "run", ["t"], resume=0)
    fill(writer, range(2))
    writer.close()
    check(open_ledger(tmp_path / "run"), 2)


def test_a_folder_with_rows_and_no_header_is_left_alone(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    fill(writer, range(2))
    writer.close()
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(StoreError, match="already holds a run"):
        RunWriter(tmp_path / "run", ["t"], resume=0)


@pytest.mark.parametrize("address", ["", "s3://bucket/run", "gs://x"])
def test_only_folders_of_this_machine(address: str) -> None:
    for use in (lambda: RunWriter(address, ["t"]), lambda: open_ledger(address)):
        with pytest.raises(StoreError, match="is no folder of this machine"):
            use()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(StoreError, match="file' is a file: name a folder"):
        RunWriter(file, ["t"])
    with pytest.raises(StoreError, match="part of that path is a file"):
        RunWriter(file / "run", ["t"])
    with pytest.raises(StoreError, match="is not a run folder"):
        open_ledger(file)
    assert file.read_text() == "mine"


def test_what_is_no_run_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder"):
        open_ledger(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"is not a run folder \(it has no run\.json\)"):
        open_ledger(tmp_path)
    (tmp_path / "run.json").write_text('{"format": "another tool"}')
    with pytest.raises(StoreError, match="is not that of a run"):
        open_ledger(tmp_path)
