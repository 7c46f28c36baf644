"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Debug", "Device", "RunFolder", "Seed", "Set", "Targets"]

# read by `main`, which sees the error; declared here so that every command knows it
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps.", show_default=False)]
Seed = Annotated[int | None, typer.Option("--seed", help="Of weights and order.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace any key; may be repeated.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", "-t", help="Target; several add up [default: the only one].", show_default=False
    ),
]
