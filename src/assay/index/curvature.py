"""The curvature of an index: a function of its committed rows, formed once and kept beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from assay.curvature import Block, Diagonal, Fisher
from assay.errors import InputError
from assay.index.header import Header
from assay.projection import Layer
from assay.rows import Folder, RowReader
from assay.rows.format import to_torch

__all__ = ["Curvature", "available", "forget_curvature", "is_stored", "load_blocks", "store_curvature"]

Curvature = Literal["fisher", "ekfac", "kfac", "identity"]

DONE = "curvature.json"  # written last
WIDEST = 8192  # entries of a layer whose Fisher matrix is formed
ROOM = 1 << 30  # bytes of Fisher matrices that are formed in one pass over the rows


def store_curvature(folder: Folder, header: Header, rows: RowReader) -> None:
    """Form the Fisher matrix of each layer and the mean square of each entry, and store them.

    Layers whose matrix would be too large have the diagonal only.
    """
    inner = folder.below("curvature")
    squares = torch.zeros(header.width, dtype=torch.float64)
    for _, piece in rows.pieces():
        squares += piece.square().sum(0).double()
    inner.write_array("squares", (squares / len(rows)).numpy())
    for group in _groups(header):
        for number, matrix in _fisher(header, rows, group):
            inner.write_array(f"fisher-{number:05d}", matrix.numpy())
    inner.write_json(DONE, {"rows": len(rows)})


def is_stored(folder: Folder) -> bool:
    """Whether the curvature is complete."""
    return folder.below("curvature").read_json(DONE) is not None


def available(folder: Folder, header: Header) -> tuple[Curvature, ...]:
    """What `load_blocks` can give."""
    found: list[Curvature] = []
    if all(layer.width <= WIDEST for layer in header.layers):
        found.append("fisher")
    if header.projection.kind == "pca":
        found.append("ekfac")
        if any(key.startswith("kfac/") for key in folder.below("curvature").names()):
            found.append("kfac")
    return (*found, "identity")


def forget_curvature(folder: Folder) -> None:
    """Make the next build form the curvature again."""
    folder.below("curvature").delete(DONE)


def load_blocks(folder: Folder, header: Header, curvature: Curvature) -> dict[str, Block] | None:
    """Each layer's curvature, by name; None for the identity.

    Raises:
        InputError: an unknown kind, or one that this index does not have.
        StoreError: it is damaged.
    """
    inner = folder.below("curvature")
    if curvature == "identity":
        return None
    if curvature == "fisher":
        wide = [layer for layer in header.layers if layer.width > WIDEST]
        if wide:
            raise InputError(
                f"layer {wide[0].name!r} has rows of {wide[0].width} entries, too many for a whole Fisher matrix: use "
                "curvature='ekfac', or a smaller rank."
            )
        return {
            layer.name: Fisher(to_torch(inner.read_array(f"fisher-{number:05d}")), layer.name)
            for number, layer in enumerate(header.layers)
        }
    if curvature not in ("ekfac", "kfac"):
        raise InputError(
            f"curvature={curvature!r} is not known; choose 'fisher', 'ekfac', 'kfac' or 'identity'."
        )
    if header.projection.kind != "pca":
        raise InputError(
            f"curvature={curvature!r} needs the principal axes of an index with Projection(kind='pca'); "
            "build one, or choose 'fisher'."
        )
    name = "squares" if curvature == "ekfac" else "kfac"
    if name == "kfac" and not any(key.startswith("kfac/") for key in inner.names()):
        raise InputError(
            "curvature='kfac': a parameter of this index has a side without a covariance (an embedding's vocabulary); "
            "use curvature='ekfac', or leave that parameter out of the index."
        )
    values = to_torch(inner.read_array(name))
    return {layer.name: Diagonal(values[layer.columns], layer.name) for layer in header.layers}


def _groups(header: Header) -> Iterator[list[tuple[int, Layer]]]:
    """Layers whose matrices fit into memory together."""
    group: list[tuple[int, Layer]] = []
    room = ROOM
    for number, layer in enumerate(header.layers):
        if layer.width > WIDEST:
            continue
        size = 8 * layer.width**2
        if group and size > room:
            yield group
            group, room = [], ROOM
        group.append((number, layer))
        room -= size
    if group:
        yield group


def _fisher(header: Header, rows: RowReader, group: list[tuple[int, Layer]]) -> Iterator[tuple[int, Tensor]]:
    """`[width, width]` of each layer of a group: 1/N Σ_i ĝ_i ĝ_iᵀ."""
    dtype = torch.float64 if header.dtype == "fp64" else torch.float32
    sums = {number: torch.zeros(layer.width, layer.width, dtype=dtype) for number, layer in group}
    for _, piece in rows.pieces():
        for number, layer in group:
            part = piece[:, layer.columns]
            sums[number].addmm_(part.t(), part)
    for number, total in sums.items():
        yield number, total / len(rows)
