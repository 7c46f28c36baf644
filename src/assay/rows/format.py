"""How rows are written: number types, the scales of int8, and the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.errors import InputError
from assay.rows.folder import Folder

__all__ = ["DTYPES", "Manifest", "RowDtype", "decode", "encode", "int8_scales", "read_manifest", "widen"]

RowDtype = Literal["bf16", "fp16", "fp32", "fp64", "int8"]
DTYPES: dict[RowDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int8": torch.int8,
}
ZARR = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "int8": "int8"}

NAME = "manifest.json"
FORMAT = "assay rows"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What of a row store is committed.

    Args:
        width: entries of a row.
        dtype: how they are stored.
        blocks: `(start, stop)` of the parts of a row that have a scale of their own (int8).
        shard: rows of a shard, which is a commit.
        chunk: rows of a chunk, the smallest piece that is read.
        rows: rows that are committed.
        complete: whether the writer was closed.
    """

    width: int
    dtype: RowDtype
    blocks: tuple[tuple[int, int], ...]
    shard: int
    chunk: int
    rows: int = 0
    complete: bool = False

    @property
    def parts(self) -> int:
        """Number of commits."""
        return -(-self.rows // self.shard)

    def lines(self, part: int) -> int:
        """How many of the rows are of a commit."""
        return min(self.shard, self.rows - part * self.shard)

    def write(self, folder: Folder, name: str = NAME) -> None:
        """Commit."""
        folder.write_header(name, FORMAT, VERSION, asdict(self))


def read_manifest(folder: Folder, name: str = NAME) -> Manifest | None:
    """What is committed in a folder; None if nothing ever was.

    Raises:
        StoreError: the manifest is damaged or newer than this version of assay.
    """
    found = folder.read_header(name, FORMAT, VERSION)
    if found is None:
        return None
    manifest = folder.parsed(name, Manifest, found)
    if not _is_consistent(manifest):
        raise folder.damaged(name, "its numbers contradict one another")
    return manifest


def _is_consistent(manifest: Manifest) -> bool:
    blocks = manifest.blocks
    return (
        0 < manifest.chunk <= manifest.shard
        and manifest.rows >= 0
        and manifest.width > 0
        and [a for a, _ in blocks] == [0, *(b for _, b in blocks)][: len(blocks)]
        and all(a < b for a, b in blocks)
        and bool(blocks)
        and blocks[-1][1] == manifest.width
    )


def int8_scales(rows: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """`[B, blocks]` float32: the largest absolute entry of each block of a row, over 127."""
    return torch.stack([rows[:, a:b].abs().amax(1) for a, b in blocks], 1).float() / 127


def encode(rows: Tensor, dtype: RowDtype, blocks: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
    """Rows `[B, width]` as stored, and the scales of int8.

    Raises:
        InputError: an entry is not finite, or too large for the type.
    """
    if not bool(torch.isfinite(rows).all()):
        at = int((~torch.isfinite(rows).all(1)).nonzero()[0])
        raise InputError(
            f"the gradient of example {at} of the batch is not finite: look at its loss, or drop it."
        )
    if dtype != "int8":
        stored = rows.to(DTYPES[dtype])
        if not bool(torch.isfinite(stored).all()):
            raise InputError(f"a gradient is too large for rows of {dtype!r}: use dtype='bf16' or 'fp32'.")
        return stored, None
    scales = int8_scales(rows, blocks)
    stored = torch.empty(rows.shape, dtype=torch.int8)
    for (a, b), scale in zip(blocks, scales.t(), strict=True):
        step = torch.where(scale > 0, scale, 1)[:, None].to(rows.dtype)
        stored[:, a:b] = (rows[:, a:b] / step).round().clamp(-127, 127).to(torch.int8)
    return stored, scales


def decode(stored: Tensor, scales: Tensor | None, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """`[B, width]` rows to compute with: float64 if they are stored so, else float32."""
    if stored.dtype == torch.float64:
        return stored
    return widen(stored, scales, blocks, torch.empty(stored.shape, dtype=torch.float32))


def widen(stored: Tensor, scales: Tensor | None, blocks: Sequence[tuple[int, int]], room: Tensor) -> Tensor:
    """Stored rows `[n, width]` in the type and memory of `room` `[n, width]`; scales `[n, blocks]` of int8 applied."""
    if stored.dtype == room.dtype:
        return stored
    room.copy_(stored)
    if scales is not None:
        for (a, b), scale in zip(blocks, scales.to(room.dtype).t(), strict=True):
            room[:, a:b] *= scale[:, None]
    return room


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The same bytes as a NumPy array; bfloat16 by the type that TensorStore knows."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes  # what tensorstore itself depends on

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: npt.NDArray[Any]) -> Tensor:
    """The same bytes as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))
