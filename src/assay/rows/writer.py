"""Writing rows, one committed shard after the other; several writers take turns by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.errors import InputError, StoreError
from assay.rows.folder import Folder
from assay.rows.format import DTYPES, ZARR, Manifest, RowDtype, encode, read_manifest, to_numpy
from assay.rows.share import Share
from assay.rows.table import delete_parts_from, keep_part, read_parts, write_part

__all__ = ["RowWriter", "join"]

CHUNK_BYTES = 1 << 20
CHUNKS_PER_SHARD = 32
BOUNDLESS = (
    1 << 40
)  # rows of an array that several processes write: none of them knows how many there will be


class RowWriter:
    """Appends rows to a store; goes on where a killed writer of the same settings had its last commit.

    Args:
        folder: where the store is, or will be.
        width: entries of a row.
        dtype: "bf16", "fp16", "fp32", "fp64", or "int8" with one scale per row and block.
        blocks: `(start, stop)` of the parts of a row with a scale of their own; by default the whole row.
        shard: rows of one commit; by default about 32 MiB.
        share: the shards that are this writer's, where several processes write one store; `join` makes it complete.
        keep: go on after so many rows, whatever more is committed, and whether the store is complete.

    Attributes:
        rows: rows that are committed; the next to be appended follows them.

    Raises:
        StoreError: the store is complete, was begun with other settings, cannot be written, or another process
            writes there.

    Example:
        >>> folder = Folder(None)
        >>> writer = RowWriter(folder, width=2, dtype="fp32", shard=2)
        >>> writer.append(pl.DataFrame({"id": ["a", "b", "c"]}), torch.arange(6.0).view(3, 2))
        >>> writer.rows  # one shard is whole, one row waits
        2
        >>> writer.close()
        >>> from assay.rows import RowReader
        >>> RowReader(folder).read(1, 3)
        tensor([[2., 3.],
                [4., 5.]])
    """

    def __init__(
        self,
        folder: Folder,
        width: int,
        dtype: RowDtype = "bf16",
        blocks: Sequence[tuple[int, int]] | None = None,
        shard: int | None = None,
        share: Share | None = None,
        keep: int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype!r} is not known; choose one of {', '.join(map(repr, DTYPES))}.")
        chunk = max(1, CHUNK_BYTES // (width * DTYPES[dtype].itemsize))
        shard = chunk * CHUNKS_PER_SHARD if shard is None else shard
        wanted = Manifest(width, dtype, tuple(blocks or [(0, width)]), shard, _divisor(shard, chunk))
        self._folder, self.share = folder, share or Share()
        self._lock = None if self.share.parts > 1 else folder.lock()
        found = read_manifest(folder, self.share.manifest)
        if found is None:
            self._create(wanted)
            self.manifest = wanted
            wanted.write(folder, self.share.manifest)
        else:
            if found.complete and keep is None:
                raise StoreError(f"{folder.place} is complete and takes no more rows: name another out=")
            if replace(found, rows=0, complete=False) != wanted:
                raise StoreError(
                    f"{folder.place} was begun with other settings (width, dtype or layers): name another out=, or "
                    "delete it"
                )
            self.manifest = found
        self._open = pl.DataFrame()  # lines of a shard that is committed and not full
        if found is not None:
            self._go_on(min(found.rows, found.rows if keep is None else keep))
        self._data = folder.open_array("data")
        self._scales = folder.open_array("scales") if dtype == "int8" else None
        self._waiting: list[tuple[pl.DataFrame, Tensor, Tensor | None]] = []
        self._number_waiting = 0

    @property
    def rows(self) -> int:
        """Rows that are committed."""
        return self.manifest.rows

    def tables(self) -> dict[int, pl.DataFrame]:
        """The tables of the shards that this writer has committed, by shard number."""
        lines = {self.share.shard(own): self.manifest.lines(own) for own in range(self.manifest.parts)}
        return dict(zip(lines, read_parts(self._folder, lines), strict=True))

    def append(self, table: pl.DataFrame, rows: Tensor) -> None:
        """Take rows; those that make a shard whole are committed with it.

        Args:
            table: one line per row, with a column `id`; the same columns at every call.
            rows: `[B, width]`.

        Raises:
            InputError: rows that are not finite or do not fit the type, or another number of them; none is taken.
            StoreError: the disk refuses; everything taken is kept and offered again at the next call.
        """
        if rows.shape != (len(table), self.manifest.width):
            raise InputError(
                f"rows of shape {list(rows.shape)} for {len(table)} ids: give [{len(table)}, {self.manifest.width}]."
            )
        stored, scales = encode(rows.detach().cpu(), self.manifest.dtype, self.manifest.blocks)
        self._waiting.append((table, stored, scales))
        self._number_waiting += len(table)
        while self._number_waiting >= (room := self.manifest.shard - len(self._open)):
            self._commit(room)

    def flush(self) -> None:
        """Commit what waits, although it makes no shard whole; the rows that follow are put behind it.

        Raises:
            StoreError: the disk refuses; everything taken is kept and offered again.
        """
        if self._number_waiting:
            self._commit(self._number_waiting)

    def close(self) -> None:
        """Commit what waits and mark the store as complete.

        Raises:
            StoreError: the disk refuses; close again once it does not.
        """
        if self.manifest.complete:
            return
        self.flush()
        done = replace(self.manifest, complete=True)
        if self.share.parts == 1:
            _cut(self._folder, done)
        done.write(self._folder, self.share.manifest)
        self.manifest = done
        if self._lock is not None:
            self._lock.release()

    def _create(self, manifest: Manifest) -> None:
        width, blocks = manifest.width, len(manifest.blocks)
        shard, chunk = manifest.shard, manifest.chunk
        alone = self.share.parts == 1
        rows = 0 if alone else BOUNDLESS
        create = partial(self._folder.create_array, afresh=alone)
        create("data", [rows, width], ZARR[manifest.dtype], [shard, width], [chunk, width])
        if manifest.dtype == "int8":
            create("scales", [rows, blocks], "float32", [shard, blocks], [chunk, blocks])

    def _go_on(self, rows: int) -> None:
        """After the first rows of those that are committed; what lies behind them is gone."""
        manifest = replace(self.manifest, rows=rows, complete=False)
        if rows % manifest.shard:
            own = manifest.parts - 1
            number = self.share.shard(own)
            (self._open,) = read_parts(self._folder, {number: manifest.lines(own)})
            name = write_part(self._folder, number, self._open)
        if manifest != self.manifest:
            manifest.write(self._folder, self.share.manifest)
            self.manifest = manifest
        if rows % manifest.shard:
            keep_part(self._folder, number, name)
        delete_parts_from(self._folder, manifest.parts, self.share)

    def _commit(self, number: int) -> None:
        """Shard, table, manifest: in this order, so that the manifest never says more than there is."""
        table = pl.concat([t for t, _, _ in self._waiting])
        stored = torch.cat([s for _, s, _ in self._waiting])
        scales = [s for _, _, s in self._waiting if s is not None]
        before = len(self._open)
        shard = self.share.shard((self.rows - before) // self.manifest.shard)
        start = shard * self.manifest.shard + before
        self._data = put(self._folder, "data", self._data, start, stored[:number])
        if self._scales is not None:
            self._scales = put(self._folder, "scales", self._scales, start, torch.cat(scales)[:number])
        lines = pl.concat([self._open, table[:number]]) if before else table[:number]
        name = write_part(self._folder, shard, lines)
        committed = replace(self.manifest, rows=self.rows + number)
        committed.write(self._folder, self.share.manifest)
        if before:
            keep_part(self._folder, shard, name)
        rest = torch.cat(scales)[number:] if scales else None
        self.manifest = committed
        self._open = lines if len(lines) < self.manifest.shard else lines[:0]
        self._number_waiting -= number
        self._waiting = [(table[number:], stored[number:].clone(), rest)] if self._number_waiting else []


def put(folder: Folder, name: str, array: Any, start: int, rows: Tensor) -> Any:
    """Write rows at `start`, the array made longer for them; the array that holds them."""
    if array.shape[0] != BOUNDLESS:
        array = resized(folder, name, array, [start + len(rows), rows.shape[1]])
    try:
        array[start : start + len(rows)].write(to_numpy(rows)).result()
    except (ValueError, OSError) as error:
        raise folder.refused("write", name, error) from error
    return array


def resized(folder: Folder, name: str, array: Any, shape: list[int]) -> Any:
    """The array with another number of rows; what a killed writer left beyond them is gone."""
    try:
        # of a boundless array nothing lies beyond its rows, and looking for it would take for ever
        return array.resize(exclusive_max=shape, resize_metadata_only=array.shape[0] == BOUNDLESS).result()
    except (ValueError, OSError) as error:
        raise folder.refused("write", name, error) from error


def _divisor(shard: int, chunk: int) -> int:
    """The largest number of rows up to `chunk` that divides a shard."""
    return next(size for size in range(min(chunk, shard), 0, -1) if shard % size == 0)


def join(folder: Folder, parts: int) -> None:
    """Make a store complete that several writers have filled: the bytes are those of one writer's.

    Called once, after all of them have closed.

    Raises:
        StoreError: a part is missing, not complete, or of another store.
    """
    shares = [Share(part, parts) for part in range(parts)]
    found = [read_manifest(folder, share.manifest) for share in shares]
    whole = read_manifest(folder)
    if whole is None or not whole.complete:
        whole = _joined(folder, shares, found)
        _cut(folder, whole)
        whole.write(folder)
    for share in shares:
        folder.delete(share.manifest)


def _joined(folder: Folder, shares: Sequence[Share], found: Sequence[Manifest | None]) -> Manifest:
    """The manifest of the whole."""
    done = [manifest for manifest in found if manifest is not None and manifest.complete]
    if len(done) < len(shares):
        missing = [share.part for share, m in zip(shares, found, strict=True) if m is None or not m.complete]
        raise StoreError(
            f"{folder.place}: part {', '.join(map(str, missing))} of {len(shares)} is not complete: build it first"
        )
    total = sum(manifest.rows for manifest in done)
    for share, manifest in zip(shares, done, strict=True):
        expected = share.rows(total, manifest.shard)
        if replace(manifest, rows=0) != replace(done[0], rows=0) or manifest.rows != expected:
            raise StoreError(
                f"{folder.place}: part {share.part} has {manifest.rows} rows where {expected} were expected: its "
                "process was given other examples or settings; delete the folder and build all parts alike"
            )
    return replace(done[0], rows=total)


def _cut(folder: Folder, manifest: Manifest) -> None:
    """Give the arrays the number of rows that is committed."""
    resized(folder, "data", folder.open_array("data"), [manifest.rows, manifest.width])
    if manifest.dtype == "int8":
        resized(folder, "scales", folder.open_array("scales"), [manifest.rows, len(manifest.blocks)])
