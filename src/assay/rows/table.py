"""What is known of rows beside their numbers: one Parquet file per commit, with a checksum in its name."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from io import BytesIO

import polars as pl
import pyarrow.parquet as pq

from assay.rows.folder import Folder
from assay.rows.share import Share

__all__ = ["delete_parts_from", "keep_part", "leftover_parts", "read_parts", "write_part"]

_PART = re.compile(r"part-(\d{6,})-([0-9a-f]{8})\.parquet")


def write_part(folder: Folder, number: int, table: pl.DataFrame) -> str:
    """Store one part, under a name that it gives back; the same part under the same number replaces itself."""
    file = BytesIO()
    pq.write_table(table.to_arrow(), file, compression="zstd")
    data = file.getvalue()
    name = f"part-{number:06d}-{zlib.crc32(data):08x}.parquet"
    folder.below("table").write(name, data)
    return name


def keep_part(folder: Folder, number: int, name: str) -> None:
    """Remove every other file of a part's number: what it was before it grew, or was cut."""
    inner = folder.below("table")
    for other in inner.names():
        match = _PART.fullmatch(other)
        if match and int(match[1]) == number and other != name:
            inner.delete(other)


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


def read_parts(folder: Folder, lines: Mapping[int, int]) -> list[pl.DataFrame]:
    """Parts by number, each against its checksum.

    A part that a killed writer was about to make longer, or shorter, is there twice: the one stands at the beginning of
    the other, and what is committed is read of one that is long enough.

    Args:
        folder: of the rows.
        lines: how many are committed, by the part's number.

    Raises:
        StoreError: one is missing or damaged; it is named.
    """
    inner = folder.below("table")
    names: dict[int, list[tuple[str, int]]] = {}
    for name in inner.names():
        if match := _PART.fullmatch(name):
            names.setdefault(int(match[1]), []).append((name, int(match[2], 16)))
    tables = []
    for number, committed in lines.items():
        if number not in names:
            raise inner.damaged(f"part-{number:06d}", "it is missing")
        found = [_read_part(inner, name, crc) for name, crc in names[number]]
        tables.append(max(found, key=len)[:committed])
    return tables


def _read_part(inner: Folder, name: str, crc: int) -> pl.DataFrame:
    data = inner.read(name)
    if data is None or zlib.crc32(data) != crc:
        raise inner.damaged(name, "its content does not match the checksum in its name")
    return pl.read_parquet(BytesIO(data))
