"""Whole files or none: atomic writes, frames with a checksum, and disk errors in one line."""

from __future__ import annotations

import errno
import os
import re
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow.parquet as pq

from assay.errors import InputError, StoreError, UnreadableError

_FRAME = re.compile(r"(.+)-(\d{6,})-([0-9a-f]{8})\.parquet")
_CURE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space under that quota",
    errno.EROFS: "make the disk writable or choose another out=",
    errno.EACCES: "make the folder writable or choose another out=",
    errno.EPERM: "make the folder writable or choose another out=",
    errno.ENOENT: "the folder was moved or deleted: put it back",
    errno.ENOTDIR: "part of that path is a file: choose another out=",
}


def local_path(path: str | Path) -> Path:
    """A folder of this machine.

    Raises:
        StoreError: An address of another kind, or no name at all.
    """
    text = str(path)
    if not text or "://" in text:
        raise StoreError(f"{text!r} is no folder of this machine: name one, such as 'runs/first'")
    return Path(path).expanduser()


def write_error(path: Path, error: OSError) -> StoreError:
    """One line for a write that the operating system refused: where, why, what to do."""
    reason = error.strerror or str(error)
    cure = _CURE.get(error.errno or 0, "check that disk")
    return StoreError(f"cannot write {path} ({reason}): {cure}")


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a temporary file beside `path`, sync it to the disk and rename it to `path`.

    Raises:
        StoreError: The disk refused. What was at `path` before is still there, whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
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


class FrameFile(NamedTuple):
    """What the name of a stored frame says: `NAME-NUMBER-CRC32.parquet`.

    The checksum stands in the name because there it becomes visible in the same instant as the content, and
    covers all of it, footer included.
    """

    name: str
    number: int
    crc: int


def frame_file(path: Path) -> FrameFile | None:
    """What a path says by its name; None for other files, such as those that a kill left over."""
    match = _FRAME.fullmatch(path.name)
    return FrameFile(match[1], int(match[2]), int(match[3], 16)) if match else None


def write_frame(folder: Path, name: str, number: int, frame: pl.DataFrame) -> Path:
    """Store a frame as Parquet; the same frame under the same name and number replaces itself.

    Raises:
        StoreError: The disk refused.
    """
    data = _parquet(frame)
    path = folder / f"{name}-{number:06d}-{zlib.crc32(data):08x}.parquet"
    write_atomic(path, data)
    return path


def verify_frame(path: Path) -> None:
    """Compare a stored frame with the checksum in its name.

    To be done before Parquet is decoded: a flipped bit can make a decoder ask for more memory than there is,
    which ends the process.

    Raises:
        StoreError: The file is damaged.
        UnreadableError: It cannot be read just now.
    """
    stored = frame_file(path)
    crc = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise unreadable(path, error) from error
    if stored is None or crc != stored.crc:
        raise damaged(path, "its content does not match the checksum in its name")


def frame_schema(path: Path) -> pl.Schema:
    """Column names and types of a stored frame.

    Raises:
        StoreError: The file is no Parquet file.
        UnreadableError: It cannot be read just now.
    """
    try:
        with open(path, "rb") as file:  # a path would be searched for wildcards
            return pl.Schema(pl.read_parquet_schema(file))
    except OSError as error:
        raise unreadable(path, error) from error
    except (Exception, pl.exceptions.PanicException) as error:
        raise damaged(path, str(error)) from error


def scan_frames(paths: list[Path]) -> pl.LazyFrame:
    """Stored frames of one schema below one another; no name is read as a pattern or as a partition."""
    return pl.scan_parquet(paths, glob=False, hive_partitioning=False)


def _parquet(frame: pl.DataFrame) -> memoryview:
    file = BytesIO()
    pq.write_table(frame.to_arrow(), file, compression="zstd")
    return file.getbuffer()


def damaged(path: Path, reason: str) -> StoreError:
    """One line for a file that cannot be trusted."""
    return StoreError(
        f"{path} is damaged ({one_line(reason)}): put a copy of it back, or move it out of the folder "
        "to read the rest"
    )


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """One line for a file that the operating system did not hand over; what is in it may be whole."""
    rights = error.errno in (errno.EACCES, errno.EPERM)
    cure = "check its rights" if rights else "check that disk, then try again"
    return UnreadableError(f"{path} could not be read ({one_line(error.strerror or error)}): {cure}")


def one_line(text: object) -> str:
    """First line of what another library says."""
    return str(text).strip().split("\n")[0].rstrip(".") or type(text).__name__


def check_storable(frame: pl.DataFrame, what: str) -> None:
    """Refuse now what Parquet could not hold later.

    Raises:
        InputError: A column has a type without a Parquet form (Python objects, 128-bit integers).
    """
    for name, dtype in frame.schema.items():
        try:
            if dtype == pl.Object:  # polars panics on these instead of raising
                raise TypeError("Python objects")
            _parquet(frame.select(pl.col(name).head(0)))
        except (Exception, pl.exceptions.PanicException) as error:
            raise InputError(
                f"column {name!r} of {what} has type {dtype}, which Parquet cannot hold: cast it or drop it"
            ) from error
