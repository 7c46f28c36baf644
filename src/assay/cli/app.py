"""Every command, and the one place where an error becomes a line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import typer

from assay import __version__
from assay.cli.adjoint import adjoint
from assay.cli.bench import bench
from assay.cli.credit import credit
from assay.cli.demo import demo
from assay.cli.doctor import doctor
from assay.cli.evaluate import evaluate
from assay.cli.index import index
from assay.cli.influence import influence
from assay.cli.plan import plan
from assay.cli.report import report
from assay.cli.rerun import rerun
from assay.cli.search import search
from assay.cli.select import select
from assay.cli.serve import serve
from assay.cli.train import train
from assay.errors import AssayError, AssayWarning

__all__ = ["app", "main"]

app = typer.Typer(
    name="assay",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(train)
app.command()(plan)
app.command()(report)
app.command()(influence)
app.command()(index)
app.command()(search)
app.command()(adjoint)
app.command()(rerun)
app.command()(evaluate)
app.command()(select)
app.command()(credit)
app.command()(serve)
app.command()(doctor)
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _assay(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """What was each training example worth to the model that was trained on it?

    Example: assay demo
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves by ``SystemExit``.

    The exit status is 0, 1 after an error, 2 where the arguments are no command, 130 after Ctrl-C. An error
    is one line on stderr; ``--debug`` shows where it comes from.

    Args:
        arguments: in place of those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = app(arguments or ["--help"], prog_name="assay", standalone_mode=False)
    except typer.Abort:
        status = 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        _say(f"error: {_describe(error)}")
        status = getattr(error, "exit_code", 1)
    sys.exit(status or 0)


def _describe(error: Exception) -> str:
    if hasattr(
        error, "format_message"
    ):  # an unusable command line; the class differs between versions of typer
        command = getattr(getattr(error, "ctx", None), "command_path", "assay")
        return f"{error.format_message()} Try: {command} --help"
    line = " ".join(str(error).split())
    if isinstance(error, AssayError | ImportError):
        return line
    return f"{type(error).__name__}: {line} (not foreseen: --debug shows where)"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for assay's own warnings; those of libraries only for who asked for warnings."""
    if issubclass(category, AssayWarning):
        _say(f"warning: {message}")
    elif sys.warnoptions:
        _say(warnings.formatwarning(message, category, filename, lineno, line).rstrip())


def _say(line: str) -> None:
    print(line, file=sys.stderr)
