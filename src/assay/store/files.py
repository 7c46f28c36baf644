"""Whole files or none: atomic writes, Parquet with checksums, and disk errors in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pyarrow.parquet as pq

from assay.errors import InputError, StoreError

_CURE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space under that quota",
    errno.EROFS: "make the disk writable or choose another out=",
    errno.EACCES: "make the folder writable or choose another out=",
    errno.EPERM: "make the folder writable or choose another out=",
    errno.ENOENT: "the folder was moved or deleted: put it back",
    errno.ENOTDIR: "part of that path is a file: choose another out=",
}


def write_error(path: Path, error: OSError) -> StoreError:
    """One line for a write that the operating system refused: where, why, what to do."""
    reason = error.strerror or str(error)
    cure = _CURE.get(error.errno or 0, "check that disk")
    return StoreError(f"cannot write {path} ({reason}): {cure}")


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file, sync it to the disk and rename it to `path`.

    Raises:
        StoreError: The disk refused. What was at `path` before is still there, whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise write_error(path, error) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the file system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Several network file systems have no fsync for folders; the rename itself is done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_parquet(file: BinaryIO, frame: pl.DataFrame) -> None:
    """Write a frame as Parquet whose every page carries a CRC-32."""
    pq.write_table(frame.to_arrow(), file, compression="zstd", write_page_checksum=True)


def read_schema(path: Path) -> pl.Schema:
    """Column names and types of a Parquet file, from its footer alone.

    Raises:
        StoreError: The file is torn or is no Parquet file.
    """
    try:
        with open(path, "rb") as file:  # a path would be searched for wildcards
            return pl.Schema(pl.read_parquet_schema(file))
    except (Exception, pl.exceptions.PanicException) as error:  # damage surfaces as nearly anything
        raise damaged(path, error) from error


def verify_parquet(path: Path) -> None:
    """Read a Parquet file to its end and compare the checksum of every page.

    Raises:
        StoreError: The file is damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for _ in file.iter_batches():
                pass
    except Exception as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException | str) -> StoreError:
    """One line for a file that cannot be trusted."""
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return StoreError(
        f"{path} is damaged ({reason}): put a copy of it back, or move it out of the folder to read the rest"
    )


def check_storable(frame: pl.DataFrame, what: str) -> None:
    """Refuse now what Parquet could not hold later.

    Raises:
        InputError: A column has a type without a Parquet form (Python objects, 128-bit integers).
    """
    for name, dtype in frame.schema.items():
        try:
            if "Object" in str(dtype):  # polars panics on these instead of raising
                raise TypeError("Python objects")
            write_parquet(BytesIO(), frame.select(pl.col(name).head(0)))
        except Exception as error:
            raise InputError(
                f"column {name!r} of {what} has type {dtype}, which Parquet cannot hold: cast it or drop it"
            ) from error
