"""Built embeddings, and the questions that they answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import Module

from assay.embedding.build import Blocks, Plan, Segment, build, plan_of
from assay.embedding.recorded import Recorded
from assay.errors import InputError
from assay.index.index import rows_of
from assay.index.layers import weights_named
from assay.methods.embedding import Curvature
from assay.projection import LossFn, Reduction
from assay.rows import Folder, RowReader
from assay.rows.format import to_torch
from assay.workers import Local, Workers

__all__ = ["Embeddings"]


class Embeddings:
    """Data value embeddings of everything that a run was trained on; made by `ledger.embeddings(...)`.

    Attributes:
        rows: `step, id`, one line per sample and step, in the order of the columns of `influence`.
        ids: the different ids, in the order in which they were first seen.
        checkpoints: the steps after which a segment ends: `at_step=` takes one of them.

    Example:
        >>> import assay
        >>> model = torch.nn.Linear(3, 2)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> run = assay.Run(model, sgd, methods=[assay.DataValueEmbedding(assay.Projection(rank=2))])
        >>> for ids in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 2, 4, 6]):
        ...     with run.step(ids):
        ...         loss_fn(model, (x[ids], y[ids])).backward()
        ...     sgd.step()
        ...     sgd.zero_grad()
        >>> run.close()
        >>> embeddings = run.ledger.embeddings(segments=2)
        >>> embeddings.influence(model, [(x[:5], y[:5])], loss_fn).shape
        torch.Size([5, 12])
        >>> embeddings.influence(model, [(x[:5], y[:5])], loss_fn, by="id").shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        folder: Folder,
        segments: int = 1,
        curvature: Curvature = "fisher",
        blocks: Blocks = "layer",
        momentum: bool = True,
        workers: int | Workers = 1,
    ) -> None:
        self._recorded = Recorded(folder)
        self.plan: Plan = plan_of(self._recorded, segments, curvature, blocks, momentum)
        self._folder = folder.below(self.plan.name)
        by = Local(workers) if isinstance(workers, int) else workers
        build(self._recorded, self._folder, self.plan, by)
        self.rows = self._recorded.table
        self.ids: pl.Series = self.rows["id"].unique(maintain_order=True)
        numbers = [self._recorded.steps[segment.last - 1].number for segment in self.plan.segments]
        self.checkpoints: list[int] = numbers

    def __len__(self) -> int:
        return len(self.rows)

    def influence(
        self,
        model: Module,
        queries: Iterable[object],
        loss_fn: LossFn,
        *,
        by: Literal["row", "id"] = "row",
        at_step: int | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """`[Q, rows]`: by how much each query's loss would be higher had the sample been left out of that step.

        Args:
            model: with the weights that the run ended with (those after `at_step`).
            queries: batches; each row of dimension 0 is one query.
            loss_fn: `loss_fn(model, batch)`, a scalar.
            by: "row" for every step apart; "id" for `[Q, ids]`, the sum over all steps of an id (all-epoch removal), in
                the order of `ids`.
            at_step: influence on the checkpoint after this step, one of `checkpoints`; later rows have none, 0.
            reduction: "mean" if `loss_fn` is the mean over the rows of a batch, "sum" if it is their sum.

        Raises:
            InputError: an argument that is not understood, or a model without the recorded parameters.
            StoreError: a shard is damaged or missing; its file is named.
        """
        if by not in ("row", "id"):
            raise InputError(f"influence(by={by!r}) is not known; choose 'row' or 'id'.")
        projected = self.project(model, queries, loss_fn, reduction)
        if by == "row":
            scores = projected.new_zeros(len(projected), len(self))
            for start, part in self._scores(projected, at_step):
                scores[:, start : start + part.shape[1]] = part
            return scores
        place = self.rows.select(pl.col("id").replace_strict(self.ids, range(len(self.ids))))["id"].to_numpy()
        where = torch.from_numpy(place.astype(np.int64))
        scores = projected.new_zeros(len(projected), len(self.ids))
        for start, part in self._scores(projected, at_step):
            scores.index_add_(1, where[start : start + part.shape[1]], part)
        return scores

    def project(
        self, model: Module, queries: Iterable[object], loss_fn: LossFn, reduction: Reduction = "mean"
    ) -> Tensor:
        """`[Q, width]`: P ∇ℓ of every query, as the samples' gradients were projected."""
        if reduction not in ("mean", "sum"):
            raise InputError(f"influence(reduction={reduction!r}) is not known; choose 'mean' or 'sum'.")
        header = self._recorded.header
        projector = header.projector(self._recorded.folder, weights_named(model, header.shapes))
        rows = [projector.rows(model, loss_fn, batch, rows_of(batch), reduction) for batch in queries]
        if not rows:
            raise InputError("queries: there is none; give at least one batch.")
        return torch.cat(rows).to(self._recorded.dtype).cpu()

    def by_step(self, scores: Tensor) -> pl.DataFrame:
        """The influence-by-step curve of `influence(...)`, `[Q, rows]`.

        Returns:
            `step`, `lr`, `influence` (mean over the step's samples and the queries), `magnitude` (the same of absolute
            values) and `per_lr` (magnitude over the learning rate).
        """
        frame = self.rows.select("step").with_columns(
            influence=scores.double().mean(0).numpy(), magnitude=scores.double().abs().mean(0).numpy()
        )
        curve = frame.group_by("step", maintain_order=True).mean()
        rates = self._recorded.rates()
        return curve.join(rates, on="step", how="left", maintain_order="left").select(
            "step", "lr", "influence", "magnitude", per_lr=pl.col("magnitude") / pl.col("lr")
        )

    def export(self, path: str | Path | None = None) -> Tensor:
        """`[rows, width]`: the embeddings themselves, in the order of `rows`, for clustering or a search by similarity.

        Args:
            path: a `.npy` file to write them to piece by piece, if they do not fit into memory; the tensor returned is
                then a view of that file.
        """
        shape = (len(self), self._recorded.header.width)
        if path is None:
            out = torch.zeros(shape, dtype=self._recorded.dtype)
        else:
            kind = "<f8" if self._recorded.dtype == torch.float64 else "<f4"
            out = torch.from_numpy(np.lib.format.open_memmap(str(path), "w+", kind, shape))
        for k, psi in self._back(self._identity(len(self.plan.segments) - 1), len(self.plan.segments) - 1):
            for start, E in self._local(k):
                stop = start + len(E)
                out[start:stop] = torch.cat(
                    [e @ p.t() for e, p in zip(self._by_block(E, k), psi, strict=True)], 1
                )
        return out

    # --- inside ---

    def _identity(self, segment: int) -> list[Tensor]:
        """By block `[w, looked at]`: what is looked at, the weights alone, from the end of a segment."""
        found = []
        for start, stop in self.plan.columns:
            eye = torch.eye(stop - start, dtype=self._recorded.dtype)
            found.append(
                eye if self.plan.looked_at(segment) == 1 else torch.cat([eye, torch.zeros_like(eye)], 1)
            )
        return found

    def _scores(self, projected: Tensor, at_step: int | None) -> Iterator[tuple[int, Tensor]]:
        """`(start, [Q, n])`, piece by piece."""
        last = len(self.plan.segments) - 1
        if at_step is not None:
            if at_step not in self.checkpoints:
                near = min(self.checkpoints, key=lambda step: abs(step - at_step))
                raise InputError(
                    f"influence(at_step={at_step}): no segment ends there; the nearest that does is {near}. "
                    "embeddings(segments=...) sets how many there are."
                )
            last = self.checkpoints.index(at_step)
        queries = [projected[:, start:stop] for start, stop in self.plan.columns]
        psi = [q @ eye for q, eye in zip(queries, self._identity(last), strict=True)]
        for k, own in self._back(psi, last):
            directions = torch.cat(own, 1)
            for start, E in self._local(k):
                yield start, directions @ E.t()

    def _back(self, psi: list[Tensor], last: int) -> Iterator[tuple[int, list[Tensor]]]:
        """`(segment, rows by block)` from `last` to the first: multiplied by the product of the segments between."""
        for k in range(last, -1, -1):
            yield k, psi
            if k:
                inner = self._segment(k)
                operators = [to_torch(inner.read_array(f"operator-{n:05d}")) for n in range(len(psi))]
                psi = [p @ operator for p, operator in zip(psi, operators, strict=True)]

    def _local(self, segment: int) -> Iterator[tuple[int, Tensor]]:
        """`(first row, [n, looked at])`: a segment's own embeddings, in pieces that go back in time."""
        own: Segment = self.plan.segments[segment]
        for start, piece in RowReader(self._segment(segment).below("rows")).pieces():
            yield own.stop - start - len(piece), piece.flip(0)

    def _by_block(self, E: Tensor, segment: int) -> Iterator[Tensor]:
        """`[n, looked at]` of each block."""
        times = self.plan.looked_at(segment)
        for start, stop in self.plan.columns:
            yield E[:, times * start : times * stop]

    def _segment(self, number: int) -> Folder:
        return self._folder.below(f"segment-{number:05d}")
