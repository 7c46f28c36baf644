"""What is known of rows beside their numbers: one Parquet file per commit, with a checksum in its name."""

from __future__ import annotations

import re
import zlib
from io import BytesIO

import polars as pl
import pyarrow.parquet as pq

from assay.rows.folder import Folder

__all__ = ["delete_parts_from", "read_parts", "write_part"]

_PART = re.compile(r"part-(\d{6,})-([0-9a-f]{8})\.parquet")


def write_part(folder: Folder, number: int, table: pl.DataFrame) -> None:
    """Store one part; the same part under the same number replaces itself."""
    file = BytesIO()
    pq.write_table(table.to_arrow(), file, compression="zstd")
    data = file.getvalue()
    folder.below("table").write(f"part-{number:06d}-{zlib.crc32(data):08x}.parquet", data)


def delete_parts_from(folder: Folder, number: int) -> None:
    """Remove parts that were never committed."""
    inner = folder.below("table")
    for name in inner.names():
        match = _PART.fullmatch(name)
        if match and int(match[1]) >= number:
            inner.delete(name)


def read_parts(folder: Folder, parts: int) -> list[pl.DataFrame]:
    """The first `parts` parts, in order, each against its checksum.

    Raises:
        StoreError: one is missing or damaged; it is named.
    """
    inner = folder.below("table")
    names = {int(m[1]): (name, int(m[2], 16)) for name in inner.names() if (m := _PART.fullmatch(name))}
    tables = []
    for number in range(parts):
        if number not in names:
            raise inner.damaged(f"part-{number:06d}", "it is missing")
        name, crc = names[number]
        data = inner.read(name)
        if data is None or zlib.crc32(data) != crc:
            raise inner.damaged(name, "its content does not match the checksum in its name")
        tables.append(pl.read_parquet(BytesIO(data)))
    return tables
