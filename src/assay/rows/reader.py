"""Reading rows, in pieces, with the next pieces already on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from torch import Tensor

from assay.errors import InputError, StoreError
from assay.rows.folder import Folder, tensorstore
from assay.rows.format import DTYPES, decode, read_manifest, to_torch
from assay.rows.table import read_parts

__all__ = ["RowReader"]

PIECE_BYTES = 32 << 20
AHEAD = 2


class RowReader:
    """The committed rows of a store.

    Args:
        folder: where the store is.

    Raises:
        StoreError: there is none, or it is damaged (the file is named).
    """

    def __init__(self, folder: Folder) -> None:
        manifest = read_manifest(folder)
        if manifest is None:
            raise StoreError(f"there are no rows in {folder.place}: name the out= of an index")
        self.manifest = manifest
        self._folder = folder
        self._data = folder.open_array("data")
        self._scales = folder.open_array("scales") if manifest.dtype == "int8" else None
        parts = read_parts(folder, {part: manifest.lines(part) for part in range(manifest.parts)})
        self.table = pl.concat(parts) if parts else pl.DataFrame({"id": []}, schema={"id": pl.Int64})
        if len(self.table) != manifest.rows:
            raise folder.damaged("table", f"it has {len(self.table)} lines for {manifest.rows} rows")

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.manifest.width

    def read(self, start: int, stop: int) -> Tensor:
        """`[stop − start, width]` rows, float32 (float64 if stored so).

        Raises:
            InputError: there are no such rows.
            StoreError: a shard is damaged or missing; its file is named.
        """
        if not 0 <= start <= stop <= len(self):
            raise InputError(
                f"there are no rows {start} to {stop}: the store has {len(self)}; choose among them."
            )
        return decode(*self._arrived(self._ask(start, stop)), self.manifest.blocks)

    def pieces(self, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, `(start, [n, width])`, read ahead; memory is that of a few pieces.

        Args:
            rows: rows of a piece; by default about 32 MiB as stored, in whole chunks.
        """
        for start, stored, scales in self.stored(rows):
            yield start, decode(stored, scales, self.manifest.blocks)

    def stored(self, rows: int | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The same as they are stored: `(start, [n, width], scales [n, blocks] or None)`."""
        size = self.piece_rows() if rows is None else rows
        coming: deque[tuple[int, Any]] = deque()
        for start in range(0, len(self), size):
            coming.append((start, self._ask(start, min(start + size, len(self)))))
            if len(coming) > AHEAD:
                first, asked = coming.popleft()
                yield first, *self._arrived(asked)
        while coming:
            first, asked = coming.popleft()
            yield first, *self._arrived(asked)

    def stored_piece(
        self, start: int, stop: int, room: npt.NDArray[Any] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`[stop − start, width]` as stored, and the scales of int8; several threads may ask at once.

        Args:
            start: first row.
            stop: one past the last.
            room: memory for it, of `new_room`; memory that was used before spares the system's handing out of new.

        Raises:
            StoreError: a shard is damaged or missing; its file is named.
        """
        if room is None:
            return self._arrived(self._ask(start, stop))
        room = room[: stop - start]
        written = tensorstore().array(room).write(self._data[start:stop])
        scales = self._ask_scales(start, stop)
        self._result(written)
        return to_torch(room), None if scales is None else to_torch(self._result(scales))

    def new_room(self) -> npt.NDArray[Any]:
        """Memory for one piece."""
        return np.empty((self.piece_rows(), self.width), self._data.dtype.numpy_dtype)

    def piece_rows(self) -> int:
        """Rows of a piece of about 32 MiB, in whole chunks."""
        chunk = self.manifest.chunk
        bytes_of_chunk = chunk * self.width * DTYPES[self.manifest.dtype].itemsize
        return chunk * max(1, PIECE_BYTES // bytes_of_chunk)

    def _ask(self, start: int, stop: int) -> tuple[Any, Any]:
        return self._data[start:stop].read(), self._ask_scales(start, stop)

    def _ask_scales(self, start: int, stop: int) -> Any:
        return None if self._scales is None else self._scales[start:stop].read()

    def _arrived(self, asked: tuple[Any, Any]) -> tuple[Tensor, Tensor | None]:
        data, scales = asked
        return to_torch(self._result(data)), None if scales is None else to_torch(self._result(scales))

    def _result(self, asked: Any) -> Any:
        try:
            return asked.result()
        except (ValueError, OSError) as error:
            raise self._folder.refused("read", "data", error) from error
