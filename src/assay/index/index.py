"""The influence index."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from assay.errors import AssayWarning, InputError, StoreError
from assay.index.build import Builder, IdBatches, sides_of
from assay.index.curvature import Curvature, is_stored, load_blocks
from assay.index.header import fingerprint, read_header
from assay.index.layers import select, weights_named
from assay.methods.influence import InfluenceFunction, Normalize
from assay.projection import LossFn, Projection, Projector, Reduction
from assay.rows import Folder, RowDtype, RowReader

__all__ = ["Index"]


class Index:
    """Projected gradients of a checkpoint's examples, and the influence of these examples on any query.

    Made by `Index.build`, opened again by `Index.open`.

    A score is q̂ᵀ (F + λI)⁻¹ ĝ_i (see `assay.methods.influence`): positive where the example lowers the query's loss;
    over the number of examples it estimates, in the loss's own unit, how much the query's loss would rise had the
    example been left out.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> index = Index.build(model, [(["a", "b", "c", "d"], (x[:4], y[:4])), (["e", "f", "g", "h"], (x[4:], y[4:]))],
        ...     loss_fn, projection=Projection(rank=2))
        >>> len(index)
        8
        >>> index.search(model, [(x[:2], y[:2])], loss_fn, k=3).columns
        ['query', 'rank', 'id', 'score']
        >>> index.influence(model, [(x[:2], y[:2])], loss_fn).shape
        torch.Size([2, 8])
    """

    def __init__(self, folder: Folder) -> None:
        header = read_header(folder)
        if header is None:
            raise StoreError(f"there is no index in {folder.place}: name the out= of Index.build")
        self._folder, self._header = folder, header
        if not is_stored(folder):
            raise StoreError(
                f"the index in {folder.place} is not complete: call Index.build again with the same arguments"
            )
        self._rows = RowReader(folder.below("rows"))
        self._formula: tuple[Curvature, InfluenceFunction] | None = None
        self._own: tuple[Curvature, float, Tensor] | None = None
        self._warned = False

    @classmethod
    def build(
        cls,
        model: Module,
        id_batches: IdBatches,
        loss_fn: LossFn,
        *,
        out: str | Path | None = None,
        projection: Projection | None = None,
        dtype: RowDtype = "bf16",
        reduction: Reduction = "mean",
        layers: Iterable[str | type[Module]] | None = None,
        exclude: Iterable[str] = (),
        check: Literal["first", "off"] = "first",
        shard: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Index:
        """Log the examples of a checkpoint; a build that was killed goes on at its last commit.

        Args:
            model: the checkpoint; it is run in evaluation mode, and its modes and gradients are left as they are.
            id_batches: `(ids, batch)` pairs with one id per row of dimension 0 of the batch. To go on after a kill
                they must come again in the same batches.
            loss_fn: `loss_fn(model, batch)` returns a scalar.
            out: folder, or "s3://…" or "gs://…"; None keeps the index in memory.
            projection: how gradients are made small; by default `Projection(rank=64)`.
            dtype: of the stored rows: "bf16", "fp16", "fp32", "fp64" or "int8" (one scale per row and layer).
            reduction: "mean" if `loss_fn` is a mean over examples, "sum" if it is their sum. For a mean over all
                tokens of a batch, a sum is the safer choice: what an example then counts depends on no neighbour.
            layers: names or patterns of modules and parameters, and types of modules; None takes all.
            exclude: names or patterns of parameters to leave out.
            check: "first" compares the capture with plain autograd on the first batch.
            shard: rows of one commit; by default about 32 MiB.
            progress: called with the number of examples logged so far.

        Raises:
            InputError: an argument that is not understood, a loss without a gradient, a gradient that is not finite.
            CoverageError: a parameter is used in a way that has no exact rule; it is named.
            StoreError: `out` holds a complete index or one of other settings, or the disk refuses.
        """
        if check not in ("first", "off"):
            raise InputError(f"Index.build(check={check!r}) is not known; choose 'first' or 'off'.")
        if reduction not in ("mean", "sum"):
            raise InputError(f"Index.build(reduction={reduction!r}) is not known; choose 'mean' or 'sum'.")
        folder = Folder(out)
        weights = select(model, layers, exclude)
        Builder(
            model, weights, id_batches, loss_fn, folder, projection or Projection(), dtype, reduction, check, shard,
            progress,
        ).run()  # fmt: skip
        return cls(folder)

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """An index that was built before.

        Raises:
            StoreError: there is none, it is not complete, or it is damaged (the file is named).
        """
        return cls(Folder(path))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> pl.Series:
        """`[N]`: the id of each row."""
        return self._rows.table["id"]

    @property
    def layers(self) -> pl.DataFrame:
        """One line per layer: `layer, width, parameters`."""
        return pl.DataFrame(
            [(layer.name, layer.width, ", ".join(layer.params)) for layer in self._header.layers],
            schema={"layer": pl.String, "width": pl.Int64, "parameters": pl.String},
            orient="row",
        )

    def gradients(self, start: int = 0, stop: int | None = None) -> Tensor:
        """`[stop − start, width]`: projected gradients as stored, row by row.

        Raises:
            InputError: there are no such rows.
            StoreError: a shard is damaged or missing; its file is named.
        """
        return self._rows.read(start, len(self) if stop is None else stop)

    def influence(
        self,
        model: Module,
        queries: Iterable[object],
        loss_fn: LossFn,
        damping: float = 0.1,
        normalize: Normalize | None = None,
        curvature: Curvature = "fisher",
    ) -> Tensor:
        """`[Q, N]`: what each example did for each query; each row of dimension 0 of a query batch is one query.

        Args:
            model: the checkpoint that was indexed.
            queries: batches as `loss_fn` takes them.
            loss_fn: `loss_fn(model, batch)`, reduced over the rows as in `build`.
            damping: λ in mean eigenvalues of each layer.
            normalize: None; "relatif" divides by √self-influence of the example; "unit" by the length of its gradient.
            curvature: "fisher"; "ekfac" or "kfac" on the axes of a PCA projection; "identity" for plain inner products.

        Raises:
            InputError: an argument that is not understood, or a model that is not the indexed one.
            StoreError: a shard is damaged or missing; its file is named.
        """
        directions = self._directions(model, queries, loss_fn, damping, curvature)
        scores = torch.empty(len(directions), len(self), dtype=directions.dtype)
        for start, part in self._scores(directions, damping, normalize, curvature):
            scores[:, start : start + part.shape[1]] = part
        return scores

    def search(
        self,
        model: Module,
        queries: Iterable[object],
        loss_fn: LossFn,
        k: int = 10,
        damping: float = 0.1,
        normalize: Normalize | None = None,
        curvature: Curvature = "fisher",
    ) -> pl.DataFrame:
        """The k most helpful rows for each query: `query, rank, id, score`, rank 1 the most helpful.

        Rows stream through; memory does not grow with their number. The other arguments are those of `influence`.

        Raises:
            InputError: an argument that is not understood, or a model that is not the indexed one.
            StoreError: a shard is damaged or missing; its file is named.
        """
        if not isinstance(k, int) or k < 1:
            raise InputError(f"search(k={k!r}): k must be a positive whole number.")
        directions = self._directions(model, queries, loss_fn, damping, curvature)
        best = directions.new_empty(len(directions), 0)
        rows = torch.empty(len(directions), 0, dtype=torch.long, device=directions.device)
        for start, scores in self._scores(directions, damping, normalize, curvature):
            top, at = scores.topk(min(k, scores.shape[1]), dim=1)
            best, rows = torch.cat([best, top], 1), torch.cat([rows, at + start], 1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, rows = best[:, :k], rows.gather(1, order)[:, :k]
        found = rows.shape[1]
        return pl.DataFrame(
            {
                "query": torch.arange(len(rows)).repeat_interleave(found).numpy(),
                "rank": torch.arange(1, found + 1).repeat(len(rows)).numpy(),
                "id": self.ids.gather(pl.Series(rows.flatten().cpu().numpy())),
                "score": best.flatten().cpu().numpy(),
            }
        )

    def self_influence(self, damping: float = 0.1, curvature: Curvature = "fisher") -> pl.DataFrame:
        """What each example did for its own loss: `id, self_influence`, in the order of the rows.

        Raises:
            InputError: an argument that is not understood.
            StoreError: a shard is damaged or missing; its file is named.
        """
        return pl.DataFrame(
            {"id": self.ids, "self_influence": self._self_influence(damping, curvature).numpy()}
        )

    # --- inside ---

    def _influence_function(self, damping: float, curvature: Curvature) -> InfluenceFunction:
        """The formula; curvature is read once."""
        if self._formula is None or self._formula[0] != curvature:
            blocks = load_blocks(self._folder, self._header, curvature)
            self._formula = curvature, InfluenceFunction(self._header.layers, blocks, damping)
        blocks_read = self._formula[1].blocks
        return InfluenceFunction(self._header.layers, blocks_read, damping)

    def _directions(
        self, model: Module, queries: Iterable[object], loss_fn: LossFn, damping: float, curvature: Curvature
    ) -> Tensor:
        """`[Q, width]`: (F + λI)⁻¹ q̂."""
        formula = self._influence_function(damping, curvature)
        weights = weights_named(model, self._header.shapes)
        if not self._warned and fingerprint(weights) != self._header.fingerprint:
            self._warned = True
            warnings.warn(
                "the model's weights are not those that were indexed: scores compare two different checkpoints.",
                AssayWarning,
                stacklevel=3,
            )
        projector = Projector(weights, sides_of(self._folder, self._header, weights))
        rows = [
            projector.rows(model, loss_fn, batch, rows_of(batch), self._header.reduction) for batch in queries
        ]
        if not rows:
            raise InputError("queries: there is none; give at least one batch.")
        dtype = torch.float64 if self._header.dtype == "fp64" else torch.float32
        return formula.precondition(torch.cat(rows).to(dtype).cpu())

    def _scores(
        self, directions: Tensor, damping: float, normalize: Normalize | None, curvature: Curvature
    ) -> Iterator[tuple[int, Tensor]]:
        """`(start, [Q, n])`, piece by piece."""
        if normalize not in (None, "relatif", "unit"):
            raise InputError(f"normalize={normalize!r} is not known; choose None, 'relatif' or 'unit'.")
        own = self._self_influence(damping, curvature) if normalize == "relatif" else None
        for start, piece in self._rows.pieces():
            scores = directions @ piece.t()
            if normalize is not None:
                lengths = piece.norm(dim=1) if own is None else own[start : start + len(piece)].sqrt()
                scores = torch.where(
                    lengths > 0, scores / lengths, 0
                )  # an example without a gradient did nothing
            yield start, scores

    def _self_influence(self, damping: float, curvature: Curvature) -> Tensor:
        """`[N]`, kept for the last damping."""
        if self._own is None or self._own[:2] != (curvature, damping):
            formula = self._influence_function(damping, curvature)
            parts = [formula.self_influence(piece) for _, piece in self._rows.pieces()]
            self._own = curvature, damping, torch.cat(parts)
        return self._own[2]


def rows_of(batch: object) -> int:
    """The number of rows of dimension 0 that all tensors of a batch share.

    Raises:
        InputError: there are no tensors, or they differ.
    """
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    rows = {len(x) for x in tree_leaves(plain) if isinstance(x, Tensor) and x.dim()}
    if len(rows) != 1:
        found = f"tensors of {', '.join(map(str, sorted(rows)))} rows" if rows else "no tensor"
        raise InputError(
            f"queries: a batch has {found}; its tensors must share dimension 0, one row per query."
        )
    return rows.pop()
