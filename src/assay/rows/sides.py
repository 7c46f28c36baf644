"""How projection matrices are stored beside the rows that they made."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from torch import Tensor

from assay.capture.sides import PARTS, Sides
from assay.rows.folder import Folder
from assay.rows.format import to_numpy, to_torch

__all__ = ["load_sides", "save_sides", "sides_crc"]


def sides_crc(sides: Mapping[str, Sides]) -> str:
    """A checksum of all projections."""
    crc = 0
    for name, own in sides.items():
        rest = [part for name in PARTS[2:] if (part := getattr(own, name)) is not None]
        for matrix in (own.left, own.right, *rest):
            data = b"-" if matrix is None else to_numpy(matrix).tobytes()
            crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def save_sides(folder: Folder, sides: Mapping[str, Sides]) -> None:
    """Store projections that cannot be drawn again."""
    for number, own in enumerate(sides.values()):
        for side in PARTS:
            matrix: Tensor | None = getattr(own, side)
            if matrix is not None:
                folder.write_array(_file(number, side), to_numpy(matrix))


def load_sides(folder: Folder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Sides]:
    """Stored projection matrices by parameter, of parameters with these shapes; the caller compares `sides_crc`.

    Raises:
        StoreError: a matrix is damaged.
    """
    there = {f"projection/{name.split('/')[1]}" for name in folder.names() if name.startswith("projection/")}
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        parts = (
            to_torch(folder.read_array(file)) if file in there else None
            for file in (_file(number, part) for part in PARTS)
        )
        found[name] = Sides(shape, **dict(zip(PARTS, parts, strict=True)))
    return found


def _file(number: int, side: str) -> str:
    return f"projection/{number:05d}-{side}"
