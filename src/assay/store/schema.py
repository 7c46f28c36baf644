"""Columns of the tables of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence

import polars as pl

from assay.errors import InputError
from assay.store.ids import DTYPES, IdKind

STATUSES = ("ok", "nan", "skipped")
PARTED = ("values", "account", "metadata")  # the tables that grow by parts; each has a folder of its name
DETAILS = ("tokens", "norms", "packed")  # likewise, in runs that record them
ABOUT_SAMPLES = ("metadata", "packed")  # written before the rest: what a kill leaves of values has them
STEPWISE = ("curve", "quadrature", "refresh")  # likewise, and `Ledger.table` reads them
TABLES = "tables"  # the folder of the side tables
SHARDS = "processes"  # the folder of the run folders of the other processes

ACCOUNT = pl.Schema(
    {
        "step": pl.Int64(),
        "target": pl.String(),
        "predicted": pl.Float64(),
        "carried": pl.Float64(),
        "decayed": pl.Float64(),
        "actual": pl.Float64(),
        "residual": pl.Float64(),
        "status": pl.String(),
    }
)


def value_column(target: str) -> str:
    """Name of the column that holds the values for a target, out of the way of `step`, `micro` and `id`."""
    return f"value:{target}"


def targets_of(values: pl.Schema) -> tuple[str, ...]:
    """The targets that a table of values was written for, in their order."""
    prefix = value_column("")
    return tuple(name.removeprefix(prefix) for name in values if name.startswith(prefix))


def values_schema(targets: Sequence[str], ids: IdKind | None) -> pl.Schema:
    """Columns of the table of values: one row per sample and micro-batch, one value per target."""
    return pl.Schema(
        {"step": pl.Int64(), "micro": pl.Int64(), "id": DTYPES[ids or "int"]}
        | {value_column(target): pl.Float64() for target in targets}
    )


def tokens_column(target: str) -> str:
    """Name of the column that holds a row's values for a target by position, a list; see `rest_column`."""
    return f"tokens:{target}"


def rest_column(target: str) -> str:
    """Name of the column that holds what of a row's value has no position."""
    return f"rest:{target}"


def metadata_schema(ids: IdKind | None) -> pl.Schema:
    """The one column that all metadata has."""
    return pl.Schema({"id": DTYPES[ids or "int"]})


def check_table_name(name: str) -> str:
    """A name that is safe as a file name on every system.

    Raises:
        InputError: Anything but lower-case letters, digits, "_" and "-", which leaves no way out of the
            folder.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise InputError(
            f"table name {name!r} cannot be used: give up to 64 lower-case letters, digits, '_' and '-'"
        )
    return name
