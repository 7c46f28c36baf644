"""Every command, and the one place where an error becomes a line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

import typer

from assay import __version__
from assay.cli.bench import bench
from assay.cli.demo import demo
from assay.cli.report import report
from assay.cli.train import train
from assay.errors import AssayError, AssayWarning

__all__ = ["app", "main"]

app = typer.Typer(
    name="assay",
    help="What was each training example worth to the model that was trained on it?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(train)
app.command()(report)
app.add_typer(bench, name="bench")


@app.callback()
def _assay(version: bool = typer.Option(False, "--version", help="Show the version and leave.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves by ``SystemExit``.

    The exit status is 0, 1 after an error, 2 where the arguments are no command, 130 after Ctrl-C. An error
    is one line on stderr; ``--debug`` shows where it comes from.

    Args:
        arguments: in place of those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    warnings.showwarning = _show_warning
    try:
        app(arguments)
    except Exception as error:
        if "--debug" in arguments:
            raise
        _say(_describe(error))
        sys.exit(1)


def _describe(error: Exception) -> str:
    line = " ".join(str(error).split())
    if isinstance(error, AssayError | ImportError):
        return f"error: {line}"
    return f"error: {type(error).__name__}: {line} (not foreseen: --debug shows where)"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for assay's own warnings; those of libraries are no user's business unless asked for."""
    if issubclass(category, AssayWarning):
        _say(f"warning: {message}")
    elif sys.warnoptions or os.environ.get("PYTHONWARNINGS"):
        _say(warnings.formatwarning(message, category, filename, lineno, line).rstrip())


def _say(line: str) -> None:
    print(line, file=sys.stderr)
