"""The command line: every command explains itself, and every mistake is one readable line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.console import Console
from typer.main import get_command

import assay
from assay.cli.app import app
from assay.cli.progress import follow
from assay.demo import CORPUS
from assay.train import Progress
from tests.corpus import write_documents

CLI = [sys.executable, "-c", "from assay.cli import main; main()"]


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of a command and of all below it."""
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that trains for a second on 80 short documents of the corpus."""
    data = write_documents(tmp_path / "texts.jsonl", 80, 100)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"out: {tmp_path / 'run'}\n"
        f"data: {{path: {data}, id: id}}\n"
        "model: {vocabulary: 300, context: 32, layers: 1, heads: 2, width: 16}\n"
        "targets: {by: domain, values: [bible], documents: 2}\n"
        "train: {epochs: 1, batch_size: 8}\n"
    )
    return path


@pytest.mark.parametrize("command", list(commands(get_command(app))), ids=" ".join)
def test_every_command_has_help_with_an_example(run: Any, command: tuple[str, ...]) -> None:
    status, out, err = run(*command, "--help")
    assert status == 0
    assert not err
    assert "Example: assay" in out


def test_the_version(run: Any) -> None:
    assert run("--version") == (0, f"{assay.__version__}\n", "")


def test_help_is_what_no_argument_gives(run: Any) -> None:
    assert run() == run("--help")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["frobnicate"], 2, "error: No such command 'frobnicate'. Try: assay --help"),
        (["train"], 2, "Missing argument 'CONFIG.yaml'. Try: assay train --help"),
        (["train", "none.yaml"], 1, "error: none.yaml cannot be read: No such file or directory"),
        (["train", "none.yaml", "--set", "x"], 1, "error: --set x: expected KEY=VALUE"),
        (["train", "none.yaml", "--set", "x=["], 1, "error: --set x=[: the value is not valid YAML"),
        (["train", "{config}", "--set", "train.epoch=2"], 1, "did you mean 'train.epochs'?"),
        (["train", "{config}", "--device", "nonsense"], 1, "error: the device 'nonsense' cannot be used"),
        (["train", "{config}", "--set", "data.path=none"], 1, "error: data.path: there is no none"),
        (["train", "{config}", "--set", "attribution.path=right"], 1, "'right'"),
        (["train", "{config}", "--out", "{config}"], 1, "mine.yaml"),
        (["report", "none"], 1, "error: there is no folder none"),
        (["serve", "none"], 1, "error: there is no folder none"),
        (["demo", "--quick", "--out", "{config}"], 1, "mine.yaml"),
    ],
)
def test_a_mistake_is_one_line(
    run: Any, config: Path, arguments: list[str], status: int, message: str
) -> None:
    found, out, err = run(*(argument.format(config=config) for argument in arguments))
    assert found == status
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_debug_shows_the_traceback(config: Path) -> None:
    for debug in ([], ["--debug"]):
        command = [*CLI, "train", str(config), "--set", "data.path=none", *debug]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == bool(debug)
        assert "there is no none" in done.stderr


def test_an_error_nobody_foresaw_is_one_line_too(
    run: Any, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("assay.train.train", explode)
    status, _, err = run("train", config)
    assert status == 1
    assert err == "error: ZeroDivisionError: first second (not foreseen: --debug shows where)\n"


def test_training_says_what_documents_were_worth(run: Any, config: Path, tmp_path: Path) -> None:
    status, out, err = run(
        "train", config, "--set", "train.epochs=2", "--seed", "5", "--out", tmp_path / "other"
    )
    assert status == 0
    assert not err
    ledger = assay.open(tmp_path / "other")
    assert (ledger.info["seed"], ledger.info["config"]["train"]["epochs"]) == (5, 2)
    for row in ledger.by("domain", "bible").to_dicts():
        assert f"{row['value']:+.4f}" in out
    values = ledger.values("bible")
    for value in (values["value"][0], values["value"][-1]):
        assert f"{value:+.4f}" in out
    assert f"{ledger.explained('bible'):.0%}".replace("%", " %") in out
    assert f"{(values['value'] < 0).mean():.0%}".replace("%", " %") in out
    report = tmp_path / "other" / "report.html"
    assert f"report: {report}" in out
    assert report.is_file()


def test_a_report_from_a_finished_run(run: Any, config: Path, tmp_path: Path) -> None:
    run("train", config)
    (tmp_path / "run" / "report.html").unlink()
    status, out, _ = run("report", tmp_path / "run", "--out", tmp_path / "mine.html")
    assert (status, out) == (0, f"{tmp_path / 'mine.html'}\n")
    assert "bible" in (tmp_path / "mine.html").read_text(encoding="utf-8")


def test_the_quick_demo(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    status, out, err = run("demo", "--quick")
    assert time.perf_counter() - start < 20
    assert status == 0
    assert not err
    ledger = assay.open("runs/demo")
    assert len(ledger.targets) >= 3
    corpus = pl.read_parquet(CORPUS)
    for domain in corpus["domain"].unique():
        assert domain in out
    for target in ledger.targets:
        assert f"Target {target}: most helpful and most harmful documents" in out
        assert ledger.account(target)["actual"].sum() > 0.5
        assert ledger.explained(target) == pytest.approx(1, abs=0.3)
        groups = ledger.by("domain", target)
        own, others = groups.filter(domain=target), groups.filter(pl.col("domain") != target)
        assert own["mean"].item() > others["value"].sum() / others["samples"].sum()
    assert "Overhead of assay" in out
    assert Path("runs/demo/report.html").is_file()


def test_the_demo_never_writes_over_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assay.cli.demo import _free

    monkeypatch.chdir(tmp_path)
    assert _free() == Path("runs/demo")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo-2").mkdir()
    assert _free() == Path("runs/demo-3")


def test_ctrl_c_leaves_a_readable_ledger(config: Path, tmp_path: Path) -> None:
    command = [*CLI, "train", str(config), "--set", "train.epochs=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step 1/")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "stopped after" in out
    ledger = assay.open(tmp_path / "run")
    assert ledger.account("bible").height >= 1  # however slow the machine is
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("library", ["typer", "polars", "torch"])
def test_ctrl_c_before_anything_began_is_silent(config: Path, library: str) -> None:
    script = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {library!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from assay.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", script, "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_the_benchmark_gets_its_arguments(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "overhead.py").write_text("def main(argv):\n    print(argv)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assay, "__file__", str(tmp_path / "a" / "b" / "c" / "assay.py"))
    assert run("bench", "overhead", "--steps", "3")[1] == "['--steps', '3']\n"
    (tmp_path / "benchmarks" / "overhead.py").unlink()
    status, _, err = run("bench", "overhead")
    assert status == 1
    assert "checkout" in err


def test_the_bar_shows_loss_speed_and_overhead() -> None:
    console = Console(width=120, force_terminal=True, record=True)
    with follow(console) as show:
        show(Progress(step=3, steps=10, loss=2.3456, tokens_per_second=12345.6, overhead=0.214))
    text = console.export_text()
    for part in ("3/10", "loss 2.346", "12,346 tokens/s", "overhead +21 %"):
        assert part in text


def test_a_log_gets_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with follow(Console(width=120)) as show:
        for step in range(1, 1001):
            show(Progress(step, 1000, 1.0, 10.0, None))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[0] == "step 1/1000 · loss 1.000 · 10 tokens/s · overhead –"
    assert lines[-1].startswith("step 1000/1000")


@pytest.mark.parametrize("statement", ["import assay; assay.Run", "import assay.cli", "import assay.demo"])
def test_optional_libraries_are_not_imported_early(statement: str) -> None:
    script = f"import sys; {statement}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    optional = {
        "transformers",
        "tokenizers",
        "yaml",
        "plotly",
        "jinja2",
        "datasets",
        "scipy",
        "starlette",
        "lightning",
        "accelerate",
    }
    assert not optional & set(out.split())


@pytest.mark.parametrize(("library", "extra"), [("yaml", "train"), ("tokenizers", "train")])
def test_a_missing_extra_is_named(config: Path, library: str, extra: str) -> None:
    script = f"import sys; sys.modules[{library!r}] = None; from assay.cli import main; main()"
    command = [sys.executable, "-c", script, "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {library} is not installed: pip install 'assay[{extra}]'\n"


def test_torch_threads_are_left_alone(run: Any, config: Path) -> None:
    threads = torch.get_num_threads()
    run("train", config)
    assert torch.get_num_threads() == threads
