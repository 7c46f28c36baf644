"""What is known of rows beside their numbers: one Parquet file per commit, with a checksum in its name."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from io import BytesIO

import polars as pl
import pyarrow.parquet as pq

from assay.rows.folder import Folder
from assay.rows.share import Share

__all__ = ["delete_parts_from", "leftover_parts", "read_parts", "write_part"]

_PART = re.compile(r"part-(\d{6,})-([0-9a-f]{8})\.parquet")


def write_part(folder: Folder, number: int, table: pl.DataFrame) -> None:
    """Store one part; the same part under the same number replaces itself."""
    file = BytesIO()
    pq.write_table(table.to_arrow(), file, compression="zstd")
    data = file.getvalue()
    folder.below("table").write(f"part-{number:06d}-{zlib.crc32(data):08x}.parquet", data)


def leftover_parts(folder: Folder, own: int, share: Share | None = None) -> list[str]:
    """Parts of a writer from its own-th on, which were never committed: names within `table/`."""
    share = share or Share()
    found = ((name, _PART.fullmatch(name)) for name in folder.below("table").names())
    parts = ((name, int(match[1])) for name, match in found if match)
    return [name for name, n in parts if n >= share.shard(own) and n % share.parts == share.part]


def delete_parts_from(folder: Folder, own: int, share: Share) -> None:
    """Remove them."""
    for name in leftover_parts(folder, own, share):
        folder.below("table").delete(name)


def read_parts(folder: Folder, numbers: Iterable[int]) -> list[pl.DataFrame]:
    """Parts by number, each against its checksum.

    Raises:
        StoreError: one is missing or damaged; it is named.
    """
    inner = folder.below("table")
    names = {int(m[1]): (name, int(m[2], 16)) for name in inner.names() if (m := _PART.fullmatch(name))}
    tables = []
    for number in numbers:
        if number not in names:
            raise inner.damaged(f"part-{number:06d}", "it is missing")
        name, crc = names[number]
        data = inner.read(name)
        if data is None or zlib.crc32(data) != crc:
            raise inner.damaged(name, "its content does not match the checksum in its name")
        tables.append(pl.read_parquet(BytesIO(data)))
    return tables
