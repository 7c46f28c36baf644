"""The file that a command is asked to write a table to: refused before the work, or written by its name's ending."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import InputError

if TYPE_CHECKING:
    import polars as pl

__all__ = ["check_out", "plain", "write_out"]

ENDINGS = (".json", ".csv", ".parquet")


def check_out(path: Path | None, endings: tuple[str, ...] = ENDINGS) -> None:
    """Refuse a file that could not be written once the work is done.

    Args:
        path: what `--out` names, if it was given.
        endings: of the name; none allows any.

    Raises:
        InputError: another ending, no such folder, or no right to write there.
    """
    if path is None:
        return
    if endings and path.suffix not in endings:
        raise InputError(f"--out {path}: end its name in .json, .csv or .parquet")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise InputError(
            f"--out {path}: there is no folder {path.parent}: make it first, or name another file"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--out {path} cannot be written (Permission denied): name another file")


def write_out(path: Path, table: pl.DataFrame, statement: dict[str, Any] | None = None) -> None:
    """Write a table as the ending of the name says.

    Args:
        path: of the file, as `check_out` let it pass.
        table: what is written; to JSON as a list of rows.
        statement: what JSON holds besides; the rows are then its `shares`.

    Raises:
        InputError: the disk refuses.
    """
    import polars as pl

    try:
        if path.suffix == ".json":
            rows = table.with_columns(pl.selectors.float().fill_nan(None)).to_dicts()  # JSON has no NaN
            content = rows if statement is None else {"shares": rows, **statement}
            path.write_text(json.dumps(content, indent=1, default=plain) + "\n", encoding="utf-8")
        elif path.suffix == ".csv":
            binary = pl.selectors.binary().map_elements(plain, return_dtype=pl.String)
            table.with_columns(binary).write_csv(path)
        else:
            table.write_parquet(path)
    except OSError as error:
        raise InputError(
            f"--out {path} cannot be written ({error.strerror or error}): name another file"
        ) from error


def plain(value: Any) -> str:
    """A value of any type as text, such as a date, a decimal number or bytes."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
