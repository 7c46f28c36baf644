"""Building an index: one logging pass over the examples, gone on with where it was killed.

Rows are encoded and written by one other thread while the next are computed. Several processes take turns by shard:
each reads all batches and logs those that reach into its own shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import polars as pl
import torch
from torch.nn import Module

from assay.capture import Weights
from assay.capture.bottleneck import stream_factors
from assay.capture.sides import Sides
from assay.curvature import Covariances
from assay.errors import InputError, StoreError
from assay.index.curvature import is_stored, store_curvature
from assay.index.header import Header, fingerprint, read_header, stored_sides
from assay.projection import LossFn, Projection, Projector, Reduction, random_sides, vocabularies
from assay.rows import Background, Folder, RowDtype, RowReader, RowWriter, Share
from assay.rows.format import read_manifest
from assay.rows.sides import save_sides, sides_crc
from assay.store.ids import IdKind, id_series, kind_of_dtype

__all__ = ["Builder", "IdBatches", "sides_of"]

POLL = 0.2  # seconds between looks for what part 0 has not written yet

IdBatches = Iterable[tuple[Any, object]]


@dataclass
class Builder:
    """The settings of one build; `run` does it.

    Args:
        model: the checkpoint.
        weights: the parameters that are watched.
        id_batches: `(ids, batch)` pairs, the same at every pass.
        loss_fn: `loss_fn(model, batch)`.
        folder: where the index is, or will be.
        projection: how gradients are made small.
        dtype: of the stored rows.
        reduction: how `loss_fn` reduces over examples.
        check: "first" compares the capture with plain autograd on the first batch.
        shard: rows of a commit; None for about 32 MiB.
        progress: called with the number of examples logged so far.
        share: the shards that this process logs; all of them by default.
    """

    model: Module
    weights: Weights
    id_batches: IdBatches
    loss_fn: LossFn
    folder: Folder
    projection: Projection
    dtype: RowDtype
    reduction: Reduction
    check: str
    shard: int | None
    progress: Callable[[int], None] | None
    share: Share = field(default_factory=Share)

    def run(self) -> None:
        """Log what is not committed yet; a process alone then forms the curvature."""
        header = read_header(self.folder)
        while header is None and self.share.part:  # the axes and the settings are part 0's to write
            time.sleep(POLL)
            header = read_header(self.folder)
        sides, header = self._begin() if header is None else self._go_on(header)
        projector = Projector(self.weights, sides)
        rows = self.folder.below("rows")
        if is_complete(rows):
            if self.share.parts > 1 or is_stored(self.folder):
                raise StoreError(
                    f"{self.folder.place} already holds an index: Index.open it, or name another out="
                )
        elif not is_complete(rows, self.share.manifest):
            self._log(projector, header)
        if self.share.parts == 1:
            store_curvature(self.folder, header, RowReader(rows))

    def _begin(self) -> tuple[dict[str, Sides], Header]:
        drawn = self._random()  # with principal axes, for the sides that have no covariance
        found: Covariances | None = None
        if self.projection.kind == "pca":
            found = self._covariances()
            drawn = found.sides(self.projection.rank, drawn)
        if not self.projection.drawn_again:
            save_sides(self.folder, drawn)
        projector = Projector(self.weights, drawn)
        if found is not None:
            self._save_eigenvalues(found, drawn, projector)
        header = Header(
            self.projection,
            {name: s.shape for name, s in drawn.items()},
            projector.layers,
            self.reduction,
            self.dtype,
            fingerprint(self.weights),
            sides_crc(drawn),
        )
        header.write(self.folder)
        return drawn, header

    def _go_on(self, header: Header) -> tuple[dict[str, Sides], Header]:
        sides = sides_of(self.folder, header, self.weights)
        shapes = {name: tuple(p.shape) for p, name in self.weights.names.items()}
        mine = replace(
            header,
            projection=self.projection,
            shapes=shapes,
            reduction=self.reduction,
            dtype=self.dtype,
            fingerprint=fingerprint(self.weights),
        )
        for setting in ("projection", "shapes", "reduction", "dtype", "fingerprint"):
            if getattr(mine, setting) != getattr(header, setting):
                what = {"shapes": "other layers", "fingerprint": "another checkpoint"}.get(
                    setting, f"another {setting}"
                )
                raise StoreError(
                    f"{self.folder.place} holds an index of {what}: name another out=, or delete that folder"
                )
        return sides, header

    def _random(self) -> dict[str, Sides]:
        whole = vocabularies(self.model)
        return {n: random_sides(n, p, self.projection, p in whole) for p, n in self.weights.names.items()}

    def _covariances(self) -> Covariances:
        if isinstance(self.id_batches, Iterator):
            raise InputError(
                "Projection(kind='pca') reads the examples twice, and these can be read only once: hand over a list or "
                "a loader."
            )
        bare = {n: Sides(tuple(p.shape)) for p, n in self.weights.names.items()}
        found = Covariances(self.weights, bare)
        for ids, batch in self.id_batches:
            size = len(id_series(ids, None))
            scale = float(size) if self.reduction == "mean" else 1.0
            take = partial(found.add, scale=scale)
            stream_factors(self.model, self.weights, self.loss_fn, batch, size, take)
            found.examples += size
        return found

    def _save_eigenvalues(self, found: Covariances, sides: Mapping[str, Sides], projector: Projector) -> None:
        """The KFAC eigenvalues along a row, where every parameter has them."""
        values = found.eigenvalues(sides)
        names = [self.weights.names[p] for p in projector.slices]
        if all(name in values for name in names):
            self.folder.write_array("curvature/kfac", torch.cat([values[name] for name in names]).numpy())

    def _log(self, projector: Projector, header: Header) -> None:
        blocks = [(layer.start, layer.stop) for layer in header.layers]
        writer = RowWriter(
            self.folder.below("rows"), projector.width, self.dtype, blocks, self.shard, self.share
        )
        with Background(writer.append) as background:
            done = self._log_batches(projector, writer, background)
        if not done:
            raise InputError("Index.build(id_batches): there is no example; give at least one (ids, batch).")
        writer.close()

    def _log_batches(self, projector: Projector, writer: RowWriter, background: Background) -> int:
        """Hand the rows of every example that is not committed to the writer; the number of examples."""
        committed = writer.tables()
        kind: IdKind | None = None
        done, check = 0, self.check == "first"
        for ids, batch in self.id_batches:
            series = id_series(ids, kind)
            if not len(series):
                raise InputError("Index.build(id_batches): a batch has 0 ids; give one per example.")
            kind = kind_of_dtype(series.dtype)
            size = len(series)
            wanted = self._wanted(series, done, writer.manifest.shard, committed)
            done += size
            if not wanted:
                continue
            logged = projector.rows(self.model, self.loss_fn, batch, size, self.reduction, check=check)
            check = False
            norms = pl.Series("norm", logged.double().norm(dim=1).cpu().numpy())
            for part in wanted:
                background.put(pl.DataFrame([series, norms])[part], logged[part])
            if self.progress is not None:
                self.progress(done)
        return done

    def _wanted(
        self, ids: pl.Series, start: int, shard: int, committed: Mapping[int, pl.DataFrame]
    ) -> list[slice]:
        """The parts of a batch, whose first row is row `start`, that this process has yet to log."""
        wanted = []
        for number, a, b in self.share.own(start, start + len(ids), shard):
            if number not in committed:
                wanted.append(slice(a - start, b - start))
                continue
            known = committed[number]["id"][a - number * shard : b - number * shard]
            if not ids[a - start : b - start].equals(known):
                raise StoreError(
                    f"{self.folder.place} was begun with other examples (or another order) from row {a} on: hand over "
                    "the same id_batches, or name another out="
                )
        return wanted


def sides_of(folder: Folder, header: Header, weights: Weights) -> dict[str, Sides]:
    """The projections of an index: drawn again, or read.

    Raises:
        StoreError: they are damaged, or this version of torch draws other numbers.
    """
    if not header.projection.drawn_again:
        return stored_sides(folder, header)
    by_name = {name: param for param, name in weights.names.items()}
    if set(by_name) != set(header.shapes):
        raise StoreError(
            f"{folder.place} holds an index of other layers: name another out=, or delete that folder"
        )
    sides = {name: random_sides(name, by_name[name], header.projection) for name in header.shapes}
    if sides_crc(sides) != header.sides_crc:
        raise StoreError(
            f"{folder.place} was projected with random matrices that this version of torch does not draw again: use "
            "the version that built it, or build it again"
        )
    return sides


def is_complete(rows: Folder, manifest: str = "manifest.json") -> bool:
    """Whether all rows, or those of one part, are committed."""
    found = read_manifest(rows, manifest)
    return found is not None and found.complete
