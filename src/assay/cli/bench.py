"""``assay bench``: what assay costs on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import typer

import assay
from assay.cli.options import Debug
from assay.errors import InputError

__all__ = ["bench"]

bench = typer.Typer()


@bench.callback()
def _bench() -> None:
    """Measure what assay costs on this machine.

    Example: assay bench overhead
    """


@bench.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def overhead(context: typer.Context, debug: Debug = False) -> None:
    """Measure the time and memory that in-run values add to a training step.

    Runs benchmarks/overhead.py of a source checkout, which takes every further argument.

    Example: assay bench overhead
    """
    checkout = Path(assay.__file__).parents[2]
    script = next(
        (
            file
            for folder in (checkout, Path.cwd())
            if (file := folder / "benchmarks" / "overhead.py").is_file()
        ),
        None,
    )
    if script is None:
        raise InputError("benchmarks/overhead.py is not here: run this in a checkout of assay's source")
    spec = importlib.util.spec_from_file_location("overhead", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(context.args)
