"""``assay train``: train a language model and see what every document was worth."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.options import Debug, Device, Seed, Set
from assay.errors import InputError

if TYPE_CHECKING:
    from assay.train import Config, Result

__all__ = ["assignments", "run_and_report", "train"]


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration, in YAML.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder, in place of the file's.")
    ] = None,
    device: Device = None,
    seed: Seed = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Also record what `assay influence` needs.")
    ] = False,
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Train a language model on documents and value each of them.

    A configuration that is enough: `out: runs/mine` and `data: {path: texts/}`, where texts/ is a folder of
    text files. Also read: .jsonl, .parquet and (data.dataset) Hugging Face data sets.

    Example: assay train mine.yaml --set train.epochs=2 --set targets.by=folder
    """
    from assay.train import load_config

    overrides = assignments(set_)
    overrides |= {key: v for key, v in {"out": out, "device": device, "seed": seed}.items() if v is not None}
    if embeddings:
        overrides["attribution.embeddings"] = True
    run_and_report(load_config(config, overrides))


def run_and_report(config: Config) -> Result:
    """Train with a progress bar, then print what the documents were worth and write the report.

    Ctrl-C and SIGTERM end the training early; what was recorded is kept and reported, and the exit status says so.
    """
    from assay.allocator import keep_freed_memory
    from assay.cli.progress import follow, make_console
    from assay.cli.summary import print_summary
    from assay.report import write
    from assay.train import train

    keep_freed_memory()
    console = make_console()
    with follow(console) as show, _stoppable() as signals:
        result = train(config, show)
    if result.interrupted:
        console.print(f"stopped after {result.steps} steps; what was recorded is in {result.out}")
    if result.steps:
        print_summary(console, result)
        console.print(f"report: {write(result.ledger, result.out / 'report.html')}", soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(128 + (signals[0] if signals else signal.SIGINT))
    return result


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Treat SIGTERM, which schedulers send, as Ctrl-C; yields the signals that came."""
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread may listen
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def assignments(texts: list[str] | None) -> dict[str, Any]:
    """The keys and values of `--set KEY=VALUE`."""
    return dict(_assignment(text) for text in texts or [])


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text}: expected KEY=VALUE, such as train.epochs=2")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {text}: the value is not valid YAML") from error
