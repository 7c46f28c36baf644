"""``assay plan``: what a configuration will cost, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from assay.cli.options import Debug, Device, Set
from assay.errors import InputError

if TYPE_CHECKING:
    from assay.train import Estimate

__all__ = ["plan"]


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration, in YAML.")],
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops",
            help="What the device of the real run sustains, in 10^12 operations a second "
            "[default: measured here, in seconds].",
        ),
    ] = None,
    device: Device = None,
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Say what training and each way of valuing would cost in work, time, disk and memory; nothing is trained.

    The data are read and tokenized and the model is made, as `assay train` would. Times suppose the same speed for
    everything; memory is beyond what training itself takes.

    Example: assay plan mine.yaml --tflops 200
    """
    from assay.cli.progress import make_console
    from assay.cli.train import assignments
    from assay.train import estimate, load_config

    if tflops is not None and not tflops > 0:
        raise InputError(f"--tflops {tflops} must be above 0.")
    settings = load_config(config, assignments(set_) | ({} if device is None else {"device": device}))
    found = estimate(settings, None if tflops is None else tflops * 1e12)
    console = make_console()
    console.print(
        f"{found.parameters:,} parameters, {found.steps:,} steps, {found.samples:,} rows, {found.tokens:,} tokens with "
        f"padding; {found.speed / 1e12:.3g} TFLOP/s {'seen here' if tflops is None else 'as given'}",
        soft_wrap=True,
    )
    console.print(_table(found))


def _table(found: Estimate) -> Table:
    from assay.plan import as_bytes, as_share, as_time

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("what")
    for name in ("work", "time", "disk", "memory"):
        table.add_column(name, justify="right")
    for what, work in {"training": found.training, **found.methods}.items():
        table.add_row(
            what,
            as_share(work.operations / found.training.operations),
            as_time(work.operations / found.speed),
            as_bytes(work.disk),
            as_bytes(work.memory),
        )
    return table
