"""`index.json`: what an index says about itself; and its projections."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

from assay.capture import Weights
from assay.capture.sides import Sides
from assay.projection import Layer, Projection, Reduction
from assay.rows import Folder
from assay.rows.sides import load_sides, sides_crc

__all__ = ["Header", "fingerprint", "read_header", "stored_sides"]

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
        folder.write_header(NAME, FORMAT, VERSION, asdict(self))


def read_header(folder: Folder) -> Header | None:
    """The header; None if the folder holds no index.

    Raises:
        StoreError: it is damaged, or newer than this version of assay.
    """
    found = folder.read_header(NAME, FORMAT, VERSION)
    if found is None:
        return None
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


def stored_sides(folder: Folder, header: Header) -> dict[str, Sides]:
    """The projection matrices that an index keeps, by name.

    Raises:
        StoreError: one is damaged or missing.
    """
    found = load_sides(folder, header.shapes)
    if sides_crc(found) != header.sides_crc:
        raise folder.damaged("projection", "a matrix is missing")
    return found
