"""``assay select``: which samples to keep, and the data without the others."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from assay.cli.options import Debug, RunFolder, Targets
from assay.errors import InputError

if TYPE_CHECKING:
    import polars as pl

    from assay.store import Ledger

__all__ = ["select"]


class _Format(str, Enum):
    jsonl = "jsonl"
    parquet = "parquet"
    dataset = "dataset"


class _Unseen(str, Enum):
    keep = "keep"
    drop = "drop"


def select(
    run: RunFolder,
    target: Targets = None,
    drop: Annotated[
        str | None, typer.Option("--drop", metavar="negative", help="Drop what raised the loss.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="N", help="Keep a fraction (0.8) or a number (5000) of them."),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option("--per", metavar="COLUMN", help="Choose within each group of a metadata column."),
    ] = None,
    per_domain: Annotated[bool, typer.Option("--per-domain", help="The same as --per domain.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Data to filter: .jsonl, .parquet or a folder of texts [default: the run's own]."
        ),
    ] = None,
    id_: Annotated[
        str | None,
        typer.Option("--id", help="Its column of ids [default: the run's data.id, or a hash of the text]."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Its column of texts [default: text].")] = None,
    unseen: Annotated[
        _Unseen | None,
        typer.Option(
            "--unseen",
            help="Rows the run never saw [default: keep with --data, else drop].",
            show_default=False,
        ),
    ] = None,
    format_: Annotated[_Format, typer.Option("--format", help="Of the filtered data.")] = _Format.jsonl,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write [default: RUN/selection].")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write which samples to keep, and the data without the others.

    Writes ids.parquet (every sample, its value, kept or not), the filtered data, and selection.json, which says how
    the choice was made: method, target, rule, coverage, and how much of the real loss drop the values explain.

    Example: assay select runs/demo --target python_code --drop negative --keep 0.8 --per-domain
    """
    import assay
    from assay.acting import select as choose

    ledger = assay.open(run)
    if per_domain and per not in (None, "domain"):
        raise InputError(f"--per {per} and --per-domain are two groupings: leave one of them out")
    per = "domain" if per_domain else per
    given = [name for name, value in (("--id", id_), ("--text", text)) if value is not None]
    if data is None and given:
        raise InputError(f"{given[0]} is that of --data: name the data, or leave it out for the run's own")
    if drop not in (None, "negative"):
        raise InputError(f"--drop {drop} is not known: use --drop negative")
    chosen = choose(ledger, target, drop="negative" if drop else None, keep=_number(keep), per=per)
    rows, ids = _rows(ledger, data, id_, text or "text")
    default = _Unseen.drop if data is None else _Unseen.keep
    stays: Literal["keep", "drop"] = (unseen or default).value
    written = chosen.write(out or run / "selection", rows, ids, format_.value, stays)
    statement = chosen.statement
    for line in statement["caution"]:
        typer.echo(f"caution: {line}", err=True)
    typer.echo(
        f"kept {statement['kept']:,} of {statement['samples']:,} samples, which are worth "
        f"{statement['value_of_kept']:+.4g} of {statement['value_of_all']:+.4g}"
    )
    if rows is not None:
        _say_rows(json.loads(written[-1].read_text(encoding="utf-8"))["data"], stays)
    for path in written:
        typer.echo(path)


def _number(keep: str | None) -> float | int | None:
    """A fraction if it is written as one."""
    if keep is None:
        return None
    try:
        return int(keep) if keep.isdecimal() else float(keep)
    except ValueError as error:
        raise InputError(f"--keep {keep} is no number: give a fraction such as 0.8, or a count") from error


def _say_rows(data: dict[str, int], stays: str) -> None:
    unseen = f", the {data['unseen']:,} that the run never saw among the {'kept' if stays == 'keep' else 'dropped'}"
    typer.echo(
        f"data: kept {data['kept']:,} of {data['rows']:,} rows, dropped {data['rows'] - data['kept']:,}"
        + (unseen if data["unseen"] else "")
    )


def _rows(
    ledger: Ledger, path: Path | None, id_: str | None, text: str
) -> tuple[pl.DataFrame | None, pl.Series | str]:
    """The data to filter and its ids: the user's, or that of the run, or the texts that the ledger kept."""
    from assay.train import Data, config_of, id_column, read_rows

    if path is not None:
        return read_rows(Data(path=path, id=id_, text=text), id_column(ledger))
    if "config" in ledger.info:
        return read_rows(config_of(ledger)[0].data)
    metadata = ledger.metadata()
    return (metadata, "id") if "text" in metadata.columns else (None, "id")
