"""`header.json` of a run's recorded gradients: what a row holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import Parameter

from assay.capture import Weights
from assay.capture.bottleneck import Sides
from assay.errors import StoreError
from assay.index.header import sides_crc
from assay.projection import Layer, Projection, Projector, random_sides
from assay.rows import Folder
from assay.rows.format import to_numpy, to_torch

__all__ = ["Header", "draw_sides", "load_sides", "read_header", "write_header"]

NAME = "header.json"
FORMAT = "assay recorded gradients"
VERSION = 1
SCALARS = (
    "speed",
    "scale",
    "keep",
    "carry",
    "decay",
    "pull",
    "rate",
)  # of a step and parameter, see `recursion.Update`


@dataclass(frozen=True)
class Header:
    """What a row is made of: `parts` vectors of `width` entries, one after the other.

    Args:
        projection: how gradients were made small.
        ranks: of each parameter, by name, in the order of a vector.
        shapes: of each parameter.
        layers: where each module's entries stand in a vector.
        preconditioned: whether every vector P x is followed by P D x, D the optimizer's diagonal of that step.
        draws: vectors that stand for a sample's part of the Gauss-Newton matrix; 0 where it was not recorded.
        dtype: of the stored rows.
        sides_crc: checksum of the projection matrices.
    """

    projection: Projection
    ranks: dict[str, int | None]
    shapes: dict[str, tuple[int, ...]]
    layers: tuple[Layer, ...]
    preconditioned: bool
    draws: int
    dtype: str
    sides_crc: str

    @property
    def width(self) -> int:
        """Entries of a projected gradient."""
        return self.layers[-1].stop

    @property
    def parts(self) -> int:
        """Vectors of a row: the gradient and the draws, each twice where preconditioned."""
        return (1 + self.draws) * (1 + self.preconditioned)

    @property
    def stored(self) -> bool:
        """Whether the projections cannot be drawn again: principal axes, or random ones balanced by D."""
        return self.projection.kind == "pca" or (self.preconditioned and self.projection.kind == "random")

    def sides(self, folder: Folder, weights: Weights) -> dict[str, Sides]:
        """The projections: drawn again, or read.

        Raises:
            StoreError: they are damaged, or this version of torch draws other numbers.
        """
        by_name = {name: param for param, name in weights.names.items()}
        if self.stored:
            found = load_sides(folder, self.shapes)
        else:
            found = draw_sides({n: by_name[n] for n in self.shapes}, self.projection, self.ranks)
        if sides_crc(found) != self.sides_crc:
            raise StoreError(
                f"{folder.place}: its projection is damaged, or was drawn by another version of torch: use the version "
                "that recorded it"
            )
        return found

    def projector(self, folder: Folder, weights: Weights) -> Projector:
        """What projects a query as the samples were."""
        return Projector(weights, self.sides(folder, weights))

    def entries(self) -> torch.Tensor:
        """`[width]`: the number of the parameter that each entry of a vector belongs to."""
        widths = [_width(shape, self.ranks[name]) for name, shape in self.shapes.items()]
        return torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))


def draw_sides(
    params: Mapping[str, Parameter], projection: Projection, ranks: Mapping[str, int | None]
) -> dict[str, Sides]:
    """Random projections, each parameter with its own rank."""
    return {n: random_sides(n, p, replace(projection, rank=ranks[n])) for n, p in params.items()}


def _width(shape: tuple[int, ...], rank: int | None) -> int:
    rows, columns = Sides(shape).matrix
    return rows * columns if rank is None else min(rows, rank) * min(columns, rank)


def write_header(folder: Folder, header: Header, sides: Mapping[str, Sides]) -> None:
    """Write `header.json`, and the projections where they cannot be drawn again."""
    if header.stored:
        for number, own in enumerate(sides.values()):
            for side, matrix in (("left", own.left), ("right", own.right)):
                if matrix is not None:
                    folder.write_array(f"projection/{number:05d}-{side}", to_numpy(matrix))
    folder.write_json(NAME, {"format": FORMAT, "version": VERSION, **asdict(header)})


def load_sides(folder: Folder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Sides]:
    """Stored projection matrices, by name."""
    there = {name.split("/")[1] for name in folder.names() if name.startswith("projection/")}
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        keys = [f"{number:05d}-{side}" for side in ("left", "right")]
        left, right = (
            to_torch(folder.read_array(f"projection/{key}")) if key in there else None for key in keys
        )
        found[name] = Sides(shape, left, right)
    return found


def read_header(folder: Folder) -> Header | None:
    """The header; None if nothing was recorded.

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
    try:
        return _parse(found)
    except (KeyError, TypeError, ValueError) as error:
        raise folder.damaged(NAME, f"bad field: {error}") from error


def _parse(found: dict[str, Any]) -> Header:
    if found["format"] != FORMAT:
        raise ValueError("format")
    layers = tuple(Layer(**{**layer, "params": tuple(layer["params"])}) for layer in found["layers"])
    return Header(
        Projection(**found["projection"]),
        dict(found["ranks"]),
        {name: tuple(shape) for name, shape in found["shapes"].items()},
        layers,
        bool(found["preconditioned"]),
        int(found["draws"]),
        found["dtype"],
        found["sides_crc"],
    )
