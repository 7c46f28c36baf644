"""``assay bench``: what assay costs on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

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


@bench.command()
def calibrate(
    device: Annotated[str, typer.Option(help="What to measure: cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runs that it is for.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two small layers; for trying the command.")] = False,
    debug: Debug = False,
) -> None:
    """Measure this machine's constants for the choice between contractions, and keep them for later runs.

    Takes about a minute on an otherwise idle machine. ASSAY_CONFIG names another folder for the file.

    Example: assay bench calibrate --threads 2
    """
    import torch

    from assay.capture import calibration

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {device}: {str(error).splitlines()[0]}; name one that is there."
        ) from error
    layers, rounds = (calibration.QUICK, 3) if quick else (calibration.LAYERS, 9)
    for kind in calibration.kinds(chosen):
        found = calibration.measure(chosen, layers, rounds, kind)
        file = calibration.keep(found, chosen, kind)
        typer.echo(
            f"{kind}: {found.per_entry:.3g} s per gradient entry, {found.per_flop:.3g} s per operation, blocks of "
            f"{found.block_bytes >> 20} MiB; kept in {file}"
        )
