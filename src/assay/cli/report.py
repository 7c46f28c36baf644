"""``assay report``: the report of a run, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import Debug, RunFolder

__all__ = ["report"]


def report(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write it [default: RUN/report.html].")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the report of a run: one HTML file that opens offline.

    Example: assay report runs/demo --out demo.html
    """
    import assay
    from assay.report import write

    typer.echo(write(assay.open(run), out))
