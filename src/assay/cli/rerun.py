"""``assay rerun``: repeat a run from its folder."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import Debug, RunFolder, Set

__all__ = ["rerun"]


def rerun(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder [default: the next free RUN-again…].")
    ] = None,
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Repeat a run of `assay train` or `assay demo`, and say whether the values are the same.

    The run's folder holds all that is needed: the configuration with every default, the seed, and the versions.

    Example: assay rerun runs/demo --out runs/demo-again
    """
    import assay
    from assay.cli.train import assignments, run_and_report
    from assay.train import config_of, differences, override

    first = assay.open(run)
    config, changed = config_of(first)
    for line in changed:
        typer.echo(f"note: {line}", err=True)
    overrides = assignments(set_)
    config = override(config, {**overrides, "out": out or _free(run)})
    result = run_and_report(config)
    if overrides:
        return
    if result.ledger.info["fingerprint"] != first.info.get("fingerprint"):
        typer.echo("note: the documents are not those of the first run", err=True)
    compared = differences(first, result.ledger)
    typer.echo(
        "values: the same, bit for bit"
        if compared.same
        else f"values: up to {compared.largest:.2g} of the largest one apart; "
        f"{compared.missing:,} occur in one run only"
    )


def _free(run: Path) -> Path:
    names = (run.with_name(f"{run.name}-again" + ("" if n == 1 else f"-{n}")) for n in count(1))
    return next(path for path in names if not path.exists())
