"""``assay doctor``: what lies in a run folder or an index, what is damaged, and the mending of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import Debug

__all__ = ["doctor"]


def doctor(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, an index, or a folder of them.")],
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Mend what can be mended; damaged files are moved aside, unreadable ones never."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Read everything against its checksums and say what is there and what is not whole.

    The exit status is 1 if something is damaged, missing or cannot be read (after --repair: still is), else 0.

    Example: assay doctor runs/demo --repair
    """
    from assay.doctor import examine

    diagnosis = examine(path)
    for room in diagnosis.rooms:
        rows = ", ".join(f"{number:,} {name}" for name, number in room.contents.items())
        typer.echo(
            "; ".join(filter(None, (f"{room.kind} {room.place}: {rows or 'cannot be read'}", room.note)))
        )
    for finding in diagnosis.findings:
        typer.echo(f"{finding.state}: {finding.place}\n    {finding.detail}")
        if finding.cure and not repair:
            typer.echo(f"    --repair would {finding.cure}")
    if repair:
        for finding in diagnosis.mend():
            typer.echo(f"mended: {finding.place}: {finding.cure}")
        diagnosis = examine(path)
        for finding in diagnosis.findings:
            typer.echo(f"remains {finding.state}: {finding.place}")
    if diagnosis.whole:
        typer.echo("whole" if not diagnosis.findings else "whole; what was left over does no harm")
    else:
        raise typer.Exit(1)
