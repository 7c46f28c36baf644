"""`assay select`, `assay credit` and `assay rerun` on a run that was trained by `assay train`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import assay
from assay.cli import main
from tests.corpus import write_documents

CLI = [sys.executable, "-c", "from assay.cli import main; main()"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts.jsonl and a run of two targets on it; a document without ids, named by its text."""
    folder = tmp_path_factory.mktemp("acting")
    write_documents(folder / "texts.jsonl", 90, 90)
    (folder / "mine.yaml").write_text(
        f"out: {folder / 'run'}\n"
        f"data: {{path: {folder / 'texts.jsonl'}}}\n"
        "model: {vocabulary: 300, context: 32, layers: 1, heads: 2, width: 16}\n"
        "targets: {by: domain, values: [bible, novels], documents: 2}\n"
        "train: {epochs: 2, batch_size: 8, learning_rate: 3e-3}\n"
        "attribution: {path: trapezoid, measure_every: 0}\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["train", str(folder / "mine.yaml")])
    assert not left.value.code
    return folder


def test_select_writes_the_runs_own_data(run: Any, trained: Path, tmp_path: Path) -> None:
    status, out, err = run(
        "select", trained / "run", "-t", "bible", "--drop", "negative", "--keep", "0.5", "--per-domain",
        "--out", tmp_path / "chosen",
    )  # fmt: skip
    assert status == 0
    assert not err
    values = assay.open(trained / "run").values("bible")
    kept = pl.read_parquet(tmp_path / "chosen" / "ids.parquet").filter("kept")
    assert (kept["value"] >= 0).all()
    rows = [json.loads(line) for line in (tmp_path / "chosen" / "data.jsonl").read_text().splitlines()]
    everything = [json.loads(line) for line in (trained / "texts.jsonl").read_text().splitlines()]
    from assay.train import content_id

    assert {content_id(row["text"]) for row in rows} == set(kept["id"])
    assert all(row in everything for row in rows)  # all their columns, as they were
    statement = json.loads((tmp_path / "chosen" / "selection.json").read_text())
    assert statement["methods"][0]["path"] == "trapezoid"
    assert statement["data"]["unseen"] == 4  # held out: not trained on, and not let in by the back door
    assert 0.9 < statement["explained"]["bible"] < 1.1
    assert f"kept {kept.height} of {values.height} samples" in out


@pytest.mark.parametrize("format", ["parquet", "dataset"])
def test_select_filters_other_data(run: Any, trained: Path, tmp_path: Path, format: str) -> None:
    pytest.importorskip("datasets")
    frame = pl.read_ndjson(trained / "texts.jsonl")
    extra = pl.DataFrame({"id": ["new"], "text": ["never seen"]})
    pl.concat([frame, extra], how="diagonal").write_parquet(tmp_path / "more.parquet")
    status, _, _ = run(
        "select", trained / "run", "-t", "novels", "--keep", "10", "--data", tmp_path / "more.parquet",
        "--format", format, "--out", tmp_path / "chosen",
    )  # fmt: skip
    assert status == 0
    if format == "parquet":
        found = pl.read_parquet(tmp_path / "chosen" / "data.parquet")
    else:
        import datasets

        found = datasets.load_from_disk(str(tmp_path / "chosen" / "dataset")).to_polars()
    assert found["text"].n_unique() == 10 + 4 + 1  # the kept ones, and what the run did not see
    assert "never seen" in found["text"].to_list()


def test_credit_adds_up_and_says_how(run: Any, trained: Path, tmp_path: Path) -> None:
    status, out, err = run(
        "credit", trained / "run", "--by", "source", "-t", "bible", "-o", tmp_path / "c.json"
    )
    assert status == 0
    assert not err
    content = json.loads((tmp_path / "c.json").read_text())
    assert sum(row["share"] for row in content["shares"]) == pytest.approx(1)
    for row in content["shares"]:
        assert row["low"] <= row["share"] <= row["high"]
        assert f"{100 * row['share']:.1f} %" in out
    for part in ("in-run shapley, path trapezoid, momentum instant", "exact 100.0 %", "percentile bootstrap"):
        assert part in out
    explained = assay.open(trained / "run").explained("bible")
    assert f"bible {100 * explained:.1f} %" in out
    for suffix in ("csv", "parquet"):
        assert (
            run("credit", trained / "run", "--by", "source", "-t", "bible", "-o", tmp_path / f"c.{suffix}")[0]
            == 0
        )
        read = pl.read_csv if suffix == "csv" else pl.read_parquet
        assert read(tmp_path / f"c.{suffix}")["share"].sum() == pytest.approx(1)


def test_rerun_gives_the_same_values(
    run: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("rerun", trained / "run", "--out", tmp_path / "again")
    assert status == 0, err
    assert not err
    assert "values: the same, bit for bit" in out
    first, second = assay.open(trained / "run"), assay.open(tmp_path / "again")
    for target in first.targets:
        assert first.steps(target).equals(second.steps(target))
        assert first.account(target).equals(second.account(target))
    status, out, _ = run("rerun", trained / "run", "--out", tmp_path / "other", "--set", "seed=5")
    assert status == 0
    assert "values:" not in out
    assert assay.open(tmp_path / "other").info["seed"] == 5


def test_rerun_says_what_is_not_as_it_was(run: Any, trained: Path, tmp_path: Path) -> None:
    import shutil

    from assay.train import config_of, override, train

    shutil.copytree(trained / "run", tmp_path / "run")
    config, changed = config_of(assay.open(tmp_path / "run"))
    assert changed == []
    assert train(override(config, {"out": tmp_path / "b", "train.steps": 3})).steps == 3
    header = json.loads((trained / "run" / "run.json").read_text())
    from assay.store.header import Header

    info = {**header["info"], "versions": {**header["info"]["versions"], "torch": "1.0", "numpy": "1.0"}}
    Header(tuple(header["targets"]), header["ids"], info, header["parts"]).write(tmp_path / "run")
    with (trained / "texts.jsonl").open("a") as lines:
        lines.write(json.dumps({"id": "x", "domain": "bible", "text": "One more."}) + "\n")
    try:
        status, out, err = run("rerun", tmp_path / "run", "--out", tmp_path / "again")
    finally:
        text = (trained / "texts.jsonl").read_text().splitlines(keepends=True)
        (trained / "texts.jsonl").write_text("".join(text[:-1]))
    assert status == 0
    assert "torch was 1.0 and is now" in err
    assert "the documents are not those of the first run" in err
    assert "occur in one run only" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["select", "{run}", "-t", "bible"], "say what to drop"),
        (["select", "{run}", "-t", "bible", "--keep", "many"], "--keep many is no number"),
        (["select", "{run}", "-t", "bible", "--keep", "2.0"], "between 0 and 1"),
        (["select", "{run}", "-t", "bible", "--drop", "all"], "use --drop negative"),
        (["select", "{run}", "--keep", "3"], "2 targets"),
        (["select", "{run}", "-t", "bibel", "--keep", "3"], "did you mean 'bible'"),
        (["select", "{run}", "-t", "bible", "--keep", "3", "--data", "none.jsonl"], "there is no none.jsonl"),
        (["select", "none", "--keep", "3"], "there is no folder none"),
        (["credit", "{run}", "--by", "provider", "-t", "bible"], "no metadata column 'provider'"),
        (["credit", "{run}", "--by", "source", "-t", "bible", "--level", "2"], "between 0 and 1"),
        (["credit", "{run}", "--by", "source", "-t", "bible", "-o", "x.txt"], ".json, .csv or .parquet"),
        (["rerun", "none"], "there is no folder none"),
        (["rerun", "{run}", "--set", "train.epoch=1"], "did you mean 'train.epochs'"),
    ],
)
def test_a_mistake_is_one_line(run: Any, trained: Path, arguments: list[str], message: str) -> None:
    status, out, err = run(*(argument.format(run=trained / "run") for argument in arguments))
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_a_loop_of_ones_own_cannot_be_repeated(run: Any, tmp_path: Path) -> None:
    from assay.store import RunWriter

    RunWriter(tmp_path / "own", ["t"]).close()
    status, _, err = run("rerun", tmp_path / "own")
    assert status == 1
    assert "only that loop can repeat" in err


def test_sigterm_leaves_a_whole_ledger(trained: Path, tmp_path: Path) -> None:
    command = [
        *CLI,
        "train",
        str(trained / "mine.yaml"),
        "--set",
        "train.epochs=100000",
        "-o",
        str(tmp_path / "r"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step 1/")
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Traceback" not in err
    ledger = assay.open(tmp_path / "r")
    steps = int(out.split("stopped after ")[1].split()[0])
    assert ledger.account("bible").height in (steps, steps + 1)
    assert ledger.account("bible").height >= 1  # however slow the machine is
    assert (tmp_path / "r" / "report.html").is_file()
