"""Documents are read from wherever they lie, with ids that survive shuffling and all of their metadata."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from assay.errors import AssayWarning, InputError
from assay.train import content_id, read_documents
from assay.train.config import Data, Targets
from assay.train.data import hold_out

TEXTS = ["In the beginning", "def main():", "café ☕"]


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in zip(("old/a.txt", "b.py", ".git/c.txt"), TEXTS, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(AssayWarning, match=r"1 files are not UTF-8 text and are left out, d\.bin first"):
        documents = read_documents(Data(path=tmp_path))
    assert documents.sort("file").to_dicts() == [
        {"id": content_id("def main():"), "file": "b.py", "folder": ".", "text": "def main():"},
        {
            "id": content_id("In the beginning"),
            "file": "old/a.txt",
            "folder": "old",
            "text": "In the beginning",
        },
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_with_ids_and_metadata(tmp_path: Path, kind: str) -> None:
    frame = pl.DataFrame(
        {"name": [3, 1, 2], "body": TEXTS, "lang": ["en", "py", None], "score": [0.5, 1.0, 2.0]}
    )
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        frame.write_parquet(path)
    else:
        write_json_lines(path, frame.to_dicts())
    documents = read_documents(Data(path=path, text="body", id="name"))
    expected = frame.select(pl.col("name").alias("id"), "lang", "score", pl.col("body").alias("text"))
    assert documents.equals(expected)
    assert read_documents(Data(path=path, text="body", id="name", limit=2)).equals(expected.head(2))


def test_ids_follow_the_text_not_its_place(tmp_path: Path) -> None:
    there = read_documents(Data(path=write_json_lines(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])))
    back = read_documents(
        Data(path=write_json_lines(tmp_path / "b.jsonl", [{"text": t} for t in TEXTS[::-1]]))
    )
    assert dict(zip(there["text"], there["id"], strict=True)) == dict(
        zip(back["text"], back["id"], strict=True)
    )
    assert there["id"].n_unique() == 3


def test_a_column_that_is_in_the_way_is_replaced(tmp_path: Path) -> None:
    rows = [{"id": "one", "text": "old", "body": "new", "key": 7}]
    documents = read_documents(Data(path=write_json_lines(tmp_path / "a.jsonl", rows), text="body", id="key"))
    assert documents.to_dicts() == [{"id": 7, "text": "new"}]


def test_what_cannot_be_used_is_left_out_aloud(tmp_path: Path) -> None:
    rows = [{"text": "a", "tags": [1]}, {"text": " \n", "tags": []}, {"text": None, "tags": None}]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    with pytest.warns(AssayWarning) as warned:
        documents = read_documents(Data(path=path))
    assert [str(w.message).split(": ")[1] for w in warned] == [
        "2 documents without text are left out",
        "the columns tags hold no plain values and are left out",
    ]
    assert documents.columns == ["id", "text"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"txet": "a"}], {}, "there is no column 'text'; did you mean 'txet'? (columns: txet)"),
        ([{"text": 3}], {}, "the column 'text' holds Int64, not text"),
        ([{"text": ""}], {}, "holds no text"),
        (
            [{"text": "a", "k": 0.5}],
            {"id": "k"},
            "the ids in 'k' are Float64; they must be integers or strings",
        ),
        ([{"text": "a", "k": 1}, {"text": "b"}], {"id": "k"}, "1 documents have no id in the column 'k'"),
        ([{"text": "a"}], {"id": "key"}, "there is no column 'key'"),
        ([{"text": "a", "k": 2**63}], {"id": "k"}, "the ids in 'k' reach 9223372036854775808, beyond"),
        ([{"text": "a", "k": 1}, {"text": "b", "k": 2**70}], {"id": "k"}, "store them as strings"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*without text.*")
def test_what_a_bad_column_is_told(tmp_path: Path, rows: Any, options: Any, message: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as error:
        read_documents(Data(path=path, **options))
    assert message in str(error.value)


@pytest.mark.filterwarnings("ignore:.*not UTF-8 text.*")
def test_what_a_bad_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "data.csv").write_text("text\na\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries" / "a").write_bytes(b"\xff\xfe")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    (tmp_path / "key.jsonl").write_text('{"text": "a", "\\uDE00": 1}\n')
    for name, message in {
        "bad.jsonl": "line 2: not valid JSON",
        "list.jsonl": "line 1: expected an object",
        "bad.parquet": "cannot be read as Parquet",
        "data.csv": "neither a folder nor a .jsonl or .parquet file",
        "none": "there is no",
        "empty": "no document was found",
        "empty.jsonl": "no document was found",
        "blank.jsonl": "no document was found",
        "binaries": "no document was found",
        "half.jsonl": "line 2: \\ud83d is half a character",
        "key.jsonl": "line 1: \\uDE00 is half a character".lower(),
    }.items():
        with pytest.raises(InputError) as error:
            read_documents(Data(path=tmp_path / name))
        assert message in str(error.value)
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "texts/b/c.txt", "texts/b"])
def test_what_may_not_be_read_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts" / "b").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "b" / "c.txt").write_text("c")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "a.parquet")

    def refusing(original: Any) -> Any:  # root may read whatever it likes
        def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, str | Path) and Path(path) == tmp_path / name:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *arguments, **options)

        return refuse

    monkeypatch.setattr(io, "open", refusing(io.open))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    with pytest.raises(
        InputError, match=rf"{name} cannot be read \(Permission denied\): check its permissions"
    ):
        read_documents(Data(path=tmp_path / name.split("/")[0]))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8-sig")
    assert read_documents(Data(path=tmp_path / "a.jsonl"))["text"].to_list() == ["a", "b"]


def test_a_dataset_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"datasets is not installed: pip install 'assay\[datasets\]'"):
        read_documents(Data(dataset="some/name"))


def test_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_json_lines(tmp_path / "set" / "train.jsonl", [{"text": t, "n": i} for i, t in enumerate(TEXTS)])
    datasets.disable_progress_bars()
    documents = read_documents(Data(dataset=str(tmp_path / "set"), limit=2))
    assert documents["text"].to_list() == TEXTS[:2]
    assert documents["n"].to_list() == [0, 1]
    with pytest.raises(InputError, match=r"'no/such-name' cannot be loaded \(.*is the name right"):
        read_documents(Data(dataset="no/such-name"))


def documents(domains: str = "aaabbbbc") -> pl.DataFrame:
    texts = [f"text {n}" for n in range(len(domains))]
    return pl.DataFrame({"id": [content_id(t) for t in texts], "domain": list(domains), "text": texts})


def test_held_out_documents_are_not_trained_on() -> None:
    frame = documents()
    kept, held = hold_out(frame, Targets(by="domain", values=["a", "b"], documents=2), seed=0)
    assert {name: part["domain"].unique().to_list() for name, part in held.items()} == {
        "a": ["a"],
        "b": ["b"],
    }
    assert kept.height == 4
    everything = sorted([*kept["text"], *held["a"]["text"], *held["b"]["text"]])
    assert everything == sorted(frame["text"])


def test_the_choice_depends_on_the_seed_not_on_the_order() -> None:
    frame, targets = documents("a" * 50), Targets(documents=10)
    _, first = hold_out(frame, targets, seed=0)
    _, again = hold_out(frame.reverse(), targets, seed=0)
    _, other = hold_out(frame, targets, seed=1)
    assert set(first["held_out"]["text"]) == set(again["held_out"]["text"])
    assert set(first["held_out"]["text"]) != set(other["held_out"]["text"])


def test_a_copy_of_a_held_out_text_is_not_trained_on() -> None:
    frame = pl.DataFrame({"id": [1, 2, 3, 4], "text": ["same", "same", "same", "other"]})
    kept, held = hold_out(frame, Targets(documents=1), seed=1)
    assert not set(kept["text"]) & set(held["held_out"]["text"])
    frame = pl.DataFrame({"id": [1, 1, 1, 2], "text": ["a", "b", "c", "d"]})
    kept, held = hold_out(frame, Targets(documents=1), seed=0)
    assert not set(kept["id"]) & set(held["held_out"]["id"])


def test_a_column_of_names_is_no_list_of_targets() -> None:
    frame = documents("a" * 40).with_columns(pl.Series("file", [f"{n}.txt" for n in range(40)]))
    with pytest.raises(InputError, match=r"'file' has 40 values.* choose up to 32 in targets\.values"):
        hold_out(frame, Targets(by="file", documents=1), seed=0)
    _, held = hold_out(frame, Targets(by="file", values=["7.txt"], documents=1), seed=0)
    assert held["7.txt"]["file"].to_list() == ["7.txt"]


def test_targets_from_files(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "mine.jsonl", [{"text": "text 0"}, {"text": "elsewhere"}])
    kept, held = hold_out(documents(), Targets(files={"mine": path}), seed=0)
    assert held["mine"]["text"].to_list() == ["text 0", "elsewhere"]
    assert kept.height == 7
    assert "text 0" not in kept["text"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Targets(by="domain", documents=2), "the target 'c' has 1 documents; targets.documents asks for 2"),
        (Targets(by="domian"), "no column 'domian'; did you mean 'domain'?"),
        (Targets(by="domain", values=["d"]), "no document has domain = 'd'"),
        (Targets(documents=8), "no document is left to train on"),
        (Targets(by="text"), "cannot be grouped by a column named 'text'; rename it"),
    ],
)
def test_targets_that_cannot_be(targets: Targets, message: str) -> None:
    with pytest.raises(InputError) as error:
        hold_out(documents(), targets, seed=0)
    assert message in str(error.value)
