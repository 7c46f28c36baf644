"""``assay evaluate``: are the values of these documents any better than chance, and which settings should be taken?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.options import Debug, Set
from assay.cli.output import check_out
from assay.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from assay.train import Config
    from assay.train.evaluation import Evaluation

__all__ = ["evaluate"]

QUICK_SUBSETS = 12


def evaluate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml|RUN", help="A configuration, or the folder of a run.")
    ],
    subsets: Annotated[
        int | None, typer.Option("--subsets", help="Random halves that are trained on [default: 32].")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="96 documents, one epoch, 4 held out, 12 halves: a first look."),
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that train.")] = 1,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder that keeps the trainings; a killed call goes on there."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the table as JSON.")] = None,
    set_: Set = None,
    debug: Debug = False,
) -> None:
    """Is it any better than random, on your own data and model, and which settings should you take?

    Trains on random halves of the documents and asks of each method how well the sums of its values foretell the
    targets' losses: the linear datamodeling score (LDS), 1 at best, 0 for random numbers. Simple baselines are asked
    too. Nothing is written unless --out or --cache say so.

    Example: assay evaluate runs/mine --quick --workers 2
    """
    from assay.cli.progress import make_console
    from assay.train.evaluation import advice
    from assay.train.evaluation import evaluate as compared
    from assay.workers import Local

    check_out(out, ())
    console = make_console()
    settings = _settings(console, config, quick, set_)
    found = compared(
        settings,
        subsets=subsets if subsets is not None else QUICK_SUBSETS if quick else 32,
        quick=quick,
        cache=cache,
        workers=Local(workers),
        say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    _print(console, found)
    console.print(f"\n{advice(found)}", highlight=False, markup=False)
    if out is not None:
        _write(out, found)
        console.print(f"table: {out}", highlight=False, soft_wrap=True)


def _settings(console: Console, config: Path, quick: bool, set_: list[str] | None) -> Config:
    """The configuration of a file or a run, with what replaces it."""
    from assay.cli.train import assignments
    from assay.store import open_ledger
    from assay.train import config_of, load_config, override
    from assay.train.evaluation import quick_form

    overrides = assignments(set_)
    if config.is_dir():
        found, changed = config_of(open_ledger(config))
        for line in changed:
            console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)
        found = override(found, overrides)
    elif not config.exists():
        raise InputError(f"there is no {config}: name a configuration, or the folder of a run of assay train")
    else:
        found = load_config(config, {"out": "unused", **overrides})
    return quick_form(found) if quick else found


def _print(console: Console, found: Evaluation) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = (
        f"LDS of {found.documents} documents for {', '.join(found.targets)}, against {found.subsets} trainings on "
        "halves; 95 % bootstrap interval over these"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("method")
    for column in ("LDS", "interval", "above random?", "behind the best?", "seconds"):
        table.add_column(column, justify="right")
    for row in found.rows:
        table.add_row(
            row.name,
            f"{row.lds:+.3f}",
            f"{row.low:+.2f} to {row.high:+.2f}",
            "yes" if row.better_than_chance else "not shown",
            "yes" if row.behind else "not shown",
            f"{row.seconds:.1f}",
        )
    console.print()
    console.print(table)
    for name, reason in found.failed.items():
        console.print(f"{name} is left out: {reason}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"One training takes {found.plain:.1f} s; a method that watches the training is one more, with its own work. "
        f"All of this took {found.seconds:.0f} s.",
        highlight=False,
        soft_wrap=True,
    )


def _write(out: Path, found: Evaluation) -> None:
    import json
    from dataclasses import asdict

    from assay.train.evaluation import advice

    try:
        out.write_text(
            json.dumps(asdict(found) | {"advice": advice(found)}, indent=1) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from error
