"""`assay index` and `assay search` on a model that was trained for a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import assay
from assay.cli import main
from assay.demo import CORPUS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a run, and its documents."""
    folder = tmp_path_factory.mktemp("trained")
    documents = pl.read_parquet(CORPUS).head(40).with_columns(pl.col("text").str.slice(0, 100))
    documents.write_parquet(folder / "texts.parquet")
    (folder / "mine.yaml").write_text(
        f"out: {folder / 'run'}\n"
        f"data: {{path: {folder / 'texts.parquet'}, id: id}}\n"
        "model: {vocabulary: 300, context: 32, layers: 1, heads: 2, width: 16}\n"
        "targets: {by: domain, values: [bible], documents: 2}\n"
        "train: {epochs: 1, batch_size: 8}\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["train", str(folder / "mine.yaml")])
    assert not left.value.code
    return folder / "run", folder / "texts.parquet"


def test_an_index_is_built_and_searched(run: Any, trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, texts = trained
    status, out, err = run("index", model, texts, "--id", "id", "--out", tmp_path / "idx", "--rank", 4)
    assert (status, err) == (0, "")
    assert "40 documents" in out
    assert "MB on disk" in out.replace("\n", " ")
    assert "logged 40/40" in out
    wanted = pl.read_parquet(texts).row(3, named=True)
    answers = tmp_path / "answers.json"
    status, out, err = run(
        "search", tmp_path / "idx", model, "-q", wanted["text"], "-q", "Nothing", "-k", 5,
        "--normalize", "unit", "--data", texts, "--id", "id", "--out", answers,
    )  # fmt: skip
    assert (status, err) == (0, "")
    found = json.loads(answers.read_text())
    assert len(found) == 10
    assert [row["rank"] for row in found[:5]] == [1, 2, 3, 4, 5]
    assert found[0]["id"] == wanted["id"]  # itself, where rows have one length
    assert found[0]["text"] == wanted["text"]
    assert str(wanted["id"]) in out
    # the run's own column of ids is found, and data of which the index knows nothing is a mistake
    assert (
        run("search", tmp_path / "idx", model, "-q", wanted["text"], "--data", texts, "-o", answers)[0] == 0
    )
    assert json.loads(answers.read_text())[0]["text"]
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "Something else."}\n')
    status, _, err = run("search", tmp_path / "idx", model, "-q", wanted["text"], "--data", other)
    assert (status, err.count("\n")) == (1, 1)
    assert "none of its ids is one of the index's" in err


def test_parts_make_the_index_of_one_process(run: Any, trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, texts = trained
    common = ["index", model, texts, "--id", "id", "--rank", 4]
    assert run(*common, "--out", tmp_path / "one")[0] == 0
    for part in ("0/2", "1/2"):
        assert run(*common, "--out", tmp_path / "two", "--part", part)[0] == 0
    assert run("index", model, texts, "--out", tmp_path / "two", "--join", 2)[0] == 0
    one, two = (assay.Index.open(tmp_path / name) for name in ("one", "two"))
    assert one.ids.equals(two.ids)
    assert (one.gradients() - two.gradients()).abs().max() == 0


@pytest.mark.parametrize("command", ["index", "search"])
def test_help_has_an_example(run: Any, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert f"Example: assay {command}" in out


def test_mistakes_are_one_line(run: Any, trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, texts = trained
    for arguments, message in [
        (["index", model, texts, "-o", tmp_path / "x", "--part", "1"], "--part 1: expected P/N"),
        (["index", model, texts, "-o", tmp_path / "x", "--dtype", "fp12"], "--dtype fp12: choose"),
        (["index", model, texts, "-o", tmp_path / "x", "--projection", "fast"], "kind='fast'"),
        (["index", model, tmp_path / "none.parquet", "-o", tmp_path / "x"], "none.parquet"),
        (["index", tmp_path / "nothing", texts, "-o", tmp_path / "x"], "nothing"),
        (["index", model, texts, "-o", tmp_path / "x", "--join", "2"], "no index in"),
        (["search", tmp_path / "x", model, "-q", "a text"], "no index in"),
        (["search", tmp_path / "x", model], "--query: give at least one"),
        (["search", tmp_path / "x", model, "-q", "a", "-o", "a.txt"], ".json, .csv or .parquet"),
    ]:
        status, _, err = run(*arguments)
        assert status == 1, (arguments, err)
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
