"""`header.json` of a run's recorded gradients: what a row holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch.nn import Parameter

from assay.capture import Weights
from assay.capture.sides import Sides
from assay.errors import StoreError
from assay.projection import Layer, Projection, Projector, random_sides
from assay.rows import Folder
from assay.rows.sides import load_sides, save_sides, sides_crc

__all__ = ["Header", "draw_sides", "read_header", "write_header"]

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
        """Whether the projections are kept: principal axes, random ones balanced by D, and those with a support."""
        balanced = self.preconditioned and self.projection.kind == "random"
        return balanced or not self.projection.drawn_again

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
    params: Mapping[str, Parameter],
    projection: Projection,
    ranks: Mapping[str, int | None],
    vocabularies: Collection[Parameter] = (),
) -> dict[str, Sides]:
    """Random projections, each parameter with its own rank, and of these parameters all rows read."""

    def of(name: str) -> Projection:
        rank, support = ranks[name], projection.support
        return replace(
            projection, rank=rank, support=None if support is None or rank is None else max(support, rank)
        )

    return {n: random_sides(n, p, of(n), p in vocabularies) for n, p in params.items()}


def _width(shape: tuple[int, ...], rank: int | None) -> int:
    rows, columns = Sides(shape).matrix
    return rows * columns if rank is None else min(rows, rank) * min(columns, rank)


def write_header(folder: Folder, header: Header, sides: Mapping[str, Sides]) -> None:
    """Write `header.json`, and the projections where they cannot be drawn again."""
    if header.stored:
        save_sides(folder, sides)
    folder.write_header(NAME, FORMAT, VERSION, asdict(header))


def read_header(folder: Folder) -> Header | None:
    """The header; None if nothing was recorded.

    Raises:
        StoreError: it is damaged, or newer than this version of assay.
    """
    found = folder.read_header(NAME, FORMAT, VERSION)
    return None if found is None else folder.parsed(NAME, Header, found)
