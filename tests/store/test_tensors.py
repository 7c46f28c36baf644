"""Files of tensors: the folder is listed when it has to be, and what another process does there is seen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import assay
from assay.errors import StoreError
from assay.store import tensors
from assay.store.tensors import TensorFiles

listening: list[list[str]] = []  # at most one


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if listening and event in ("os.listdir", "os.scandir"):
        listening[0].append(str(arguments[0]))


@pytest.fixture(scope="module")
def hook() -> None:
    sys.addaudithook(note)  # there is no way to take it off again


@pytest.fixture
def listings(hook: None) -> Iterator[list[str]]:
    """The folders that are listed from now on, each as often as it is."""
    listening.append([])
    yield listening[0]
    listening.clear()


def test_a_folder_is_not_listed_for_every_file(tmp_path: Path, listings: list[str]) -> None:
    files = TensorFiles(tmp_path / "files")
    for number in range(20):
        files.write("log", number, {"step": number})
    for number in range(0, 20, 2):
        files.write("log", number, {"step": -number})
    assert [files.read("log", number)["step"] for number in range(4)] == [0, 1, -2, 3]
    files.delete("log", 3)
    assert listings.count(str(tmp_path / "files")) == 1
    assert files.numbers("log") == [n for n in range(20) if n != 3]
    assert len(list((tmp_path / "files").iterdir())) == 19


def test_a_run_does_not_list_its_snapshots_for_each(tmp_path: Path, listings: list[str]) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = []
    with assay.Run(model, optimizer, out=tmp_path / "run", snapshots=1) as run:
        for step in range(12):
            with run.step([step]):
                model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            counts.append(listings.count(str(tmp_path / "run" / "snapshots")))
    assert TensorFiles(tmp_path / "run" / "snapshots").numbers("state") == list(range(13))
    assert counts[-1] == counts[2]


def test_what_another_process_writes_is_seen(tmp_path: Path) -> None:
    own, other = TensorFiles(tmp_path), TensorFiles(tmp_path)
    own.write("state", 1, {"from": "own"})
    assert other.read("state", 1) == {"from": "own"}
    own.write("state", 1, {"from": "anew"})
    own.write("state", 2, {"from": "later"})
    assert other.read("state", 1) == {"from": "anew"}
    assert other.read("state", 2) == {"from": "later"}
    own.delete("state", 2)
    assert other.numbers("state") == [1]
    with pytest.raises(StoreError, match="has no state number 2"):
        other.read("state", 2)


def test_of_two_that_a_kill_left_the_newer_counts_and_the_next_takes_the_place_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for older, newer in (("a", "b"), ("b", "a")):  # whichever checksum sorts behind the other
        folder = tmp_path / older
        TensorFiles(folder).write("state", 1, {"from": older})
        (first,) = folder.iterdir()
        os.utime(first, ns=(1, 1))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda path: None)  # killed before this
            TensorFiles(folder).write("state", 1, {"from": newer})
        assert len(list(folder.iterdir())) == 2
        assert TensorFiles(folder).read("state", 1) == {"from": newer}
        TensorFiles(folder).write("state", 1, {"from": "last"})
        assert len(list(folder.iterdir())) == 1


def test_a_write_that_is_refused_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = TensorFiles(tmp_path)
    files.write("state", 1, {"from": "before"})

    def refuse(path: Path, data: object) -> None:
        raise StoreError("no")

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "write_atomic", refuse)
        with pytest.raises(StoreError):
            files.write("state", 1, {"from": "refused"})
    assert files.read("state", 1) == {"from": "before"}
    files.write("state", 1, {"from": "after"})
    assert len(list(tmp_path.iterdir())) == 1
