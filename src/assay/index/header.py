"""`index.json`: what an index says about itself; and its projections."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from assay.capture import Weights
from assay.capture.bottleneck import Sides
from assay.errors import StoreError
from assay.projection import Layer, Projection, Reduction
from assay.rows import Folder
from assay.rows.format import to_numpy, to_torch

__all__ = ["Header", "fingerprint", "load_sides", "read_header", "save_sides"]

NAME = "index.json"
FORMAT = "assay index"
VERSION = 1
SAMPLED = 4096  # entries of a parameter that its fingerprint looks at


@dataclass(frozen=True)
class Header:
    """Settings of an index.

    Args:
        projection: how gradients are made small.
        shapes: each parameter's shape, by name, in the order of a row.
        layers: where each module's entries stand in a row.
        reduction: how `loss_fn` reduces over examples.
        dtype: of the stored rows.
        fingerprint: of the checkpoint's weights.
        sides_crc: checksum of the projection matrices.
    """

    projection: Projection
    shapes: dict[str, tuple[int, ...]]
    layers: tuple[Layer, ...]
    reduction: Reduction
    dtype: str
    fingerprint: str
    sides_crc: str

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.layers[-1].stop

    def write(self, folder: Folder) -> None:
        """Replace `index.json` as a whole."""
        folder.write_json(NAME, {"format": FORMAT, "version": VERSION, **asdict(self)})


def read_header(folder: Folder) -> Header | None:
    """The header; None if the folder holds no index.

    Raises:
        StoreError: it is damaged, or newer than this version of assay.
    """
    found = folder.read_json(NAME)
    if found is None:
        return None
    version = found.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{folder.place} has format version {version}, newer than this assay's {VERSION}: upgrade assay"
        )
    if found.get("format") != FORMAT:
        raise folder.damaged(NAME, f"no format {FORMAT!r}")
    header = folder.parsed(NAME, Header, found)
    if (
        not header.layers
        or header.layers[0].start != 0
        or any(before.stop != after.start for before, after in pairwise(header.layers))
    ):
        raise folder.damaged(NAME, "its layers do not lie one after the other")
    return header


@torch.no_grad()
def fingerprint(weights: Weights) -> str:
    """A checksum of up to 4,096 entries of each parameter: another checkpoint has another."""
    crc = 0
    for param, name in weights.names.items():
        flat = param.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED)].double().cpu()
        crc = zlib.crc32(some.numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def sides_crc(sides: Mapping[str, Sides]) -> str:
    """A checksum of all projection matrices."""
    crc = 0
    for name, own in sides.items():
        for matrix in (own.left, own.right):
            data = b"-" if matrix is None else to_numpy(matrix).tobytes()
            crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def save_sides(folder: Folder, sides: Mapping[str, Sides]) -> None:
    """Store projection matrices that cannot be drawn again."""
    for number, own in enumerate(sides.values()):
        for side in ("left", "right"):
            matrix: Tensor | None = getattr(own, side)
            if matrix is not None:
                folder.write_array(f"projection/{number:05d}-{side}", to_numpy(matrix))


def load_sides(folder: Folder, header: Header) -> dict[str, Sides]:
    """Stored projection matrices, by name."""
    there = {name.split("/")[1] for name in folder.names() if name.startswith("projection/")}
    found = {}
    for number, (name, shape) in enumerate(header.shapes.items()):
        left, right = (
            to_torch(folder.read_array(f"projection/{key}")) if key in there else None
            for key in (f"{number:05d}-left", f"{number:05d}-right")
        )
        found[name] = Sides(shape, left, right)
    if sides_crc(found) != header.sides_crc:
        raise folder.damaged("projection", "a matrix is missing")
    return found
