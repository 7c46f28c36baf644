"""The influence index."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import polars as pl
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from assay.errors import AssayWarning, InputError, StoreError
from assay.index.build import Builder, IdBatches, sides_of
from assay.index.curvature import Curvature, available, is_stored, load_blocks, store_curvature
from assay.index.header import fingerprint, read_header
from assay.index.layers import select, weights_named
from assay.index.scores import best_rows, stream_scores
from assay.index.spread import best_by, build_by
from assay.index.tokens import token_scores
from assay.methods.influence import InfluenceFunction, Normalize
from assay.projection import LossFn, Projection, Projector, Reduction
from assay.rows import Folder, RowDtype, RowReader, Share, join
from assay.workers import Workers

if TYPE_CHECKING:
    from assay.evaluate.subsets import SubsetTruth
    from assay.index.tune import Tuning

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
        workers: Workers | None = None,
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
            workers: who log, `assay.workers.Local(4)` or `assay.integrations.ray.RayWorkers()`: model, batches and loss
                function are handed to them, and `progress` is called by nobody. This process alone if left out.

        Raises:
            InputError: an argument that is not understood, a loss without a gradient, a gradient that is not finite.
            CoverageError: a parameter is used in a way that has no exact rule; it is named.
            StoreError: `out` holds a complete index or one of other settings, or the disk refuses.
        """
        settings = _settings(projection, dtype, reduction, check, shard)
        if workers is not None and workers.number > 1:
            names = ("projection", "dtype", "reduction", "check", "shard")
            options = dict(zip(names, settings, strict=True)) | {
                "layers": layers,
                "exclude": exclude,
                "out": out,
            }
            return cls.join(str(out), build_by(workers, (model, id_batches, loss_fn), options))
        folder = Folder(out)
        Builder(model, select(model, layers, exclude), id_batches, loss_fn, folder, *settings, progress).run()
        return cls(folder)

    @classmethod
    def build_part(
        cls,
        model: Module,
        id_batches: IdBatches,
        loss_fn: LossFn,
        part: int,
        parts: int,
        *,
        out: str | Path,
        projection: Projection | None = None,
        dtype: RowDtype = "bf16",
        reduction: Reduction = "mean",
        layers: Iterable[str | type[Module]] | None = None,
        exclude: Iterable[str] = (),
        check: Literal["first", "off"] = "first",
        shard: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Log one part of an index that several processes build; `join` makes it complete.

        Every process is given the same model, batches and settings. It logs the batches that reach into its own
        shards (every `parts`-th) and passes over the others, so that the joined index has the bytes of a single
        process's. A batch across two shards is logged by both their processes: let a shard be many batches. Part 0
        writes the header (and fits the axes of `kind="pca"`); the others wait for it.

        Args:
            model: the checkpoint, as all further arguments as in `build`.
            id_batches: all `(ids, batch)` pairs.
            loss_fn: `loss_fn(model, batch)` returns a scalar.
            part: which process this is, from 0.
            parts: how many there are.
            out: the folder that all of them write.
            projection: see `build`.
            dtype: see `build`.
            reduction: see `build`.
            layers: see `build`.
            exclude: see `build`.
            check: see `build`.
            shard: see `build`.
            progress: see `build`; the rows that other processes log are counted.

        Raises:
            InputError: as `build`; or there is no such part.
            CoverageError: as `build`.
            StoreError: as `build`.
        """
        settings = _settings(projection, dtype, reduction, check, shard)
        weights, share = select(model, layers, exclude), Share(part, parts)
        Builder(model, weights, id_batches, loss_fn, Folder(out), *settings, progress, share).run()

    @classmethod
    def join(cls, out: str | Path, parts: int) -> Index:
        """The index of which all parts have been built: its curvature is formed, and it is opened.

        Called once, by one process.

        Raises:
            StoreError: a part is missing or not complete (it is named), or its process was given other examples.
        """
        folder = Folder(out)
        header = read_header(folder)
        if header is None:
            raise StoreError(f"there is no index in {folder.place}: name the out= of Index.build_part")
        rows = folder.below("rows")
        join(rows, parts)
        if not is_stored(folder):
            store_curvature(folder, header, RowReader(rows))
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
        by: Literal["layer"] | None = None,
    ) -> Tensor:
        """`[Q, N]`: what each example did for each query; each row of dimension 0 of a query batch is one query.

        Args:
            model: the checkpoint that was indexed.
            queries: batches as `loss_fn` takes them.
            loss_fn: `loss_fn(model, batch)`, reduced over the rows as in `build`.
            damping: λ in mean eigenvalues of each layer.
            normalize: None; "relatif" divides by √self-influence of the example; "unit" by the length of its gradient.
            curvature: "fisher"; "ekfac" or "kfac" on the axes of a PCA projection; "identity" for plain inner products.
            by: "layer" gives `[Q, N, layers]`, the share of each of `layers`; their sum is the influence.

        Raises:
            InputError: an argument that is not understood, or a model that is not the indexed one.
            StoreError: a shard is damaged or missing; its file is named.
        """
        if by not in (None, "layer"):
            raise InputError(f"influence(by={by!r}) is not known; choose None or 'layer'.")
        directions = self._directions(model, queries, loss_fn, damping, curvature)
        shape = [len(directions), len(self)] + ([len(self._header.layers)] if by else [])
        scores = directions.new_empty(shape)
        own = self._self_influence(damping, curvature) if normalize == "relatif" else None
        layers = self._header.layers if by else None
        for start, part in stream_scores(self._rows, directions, normalize, own, layers):
            scores[:, start : start + part.shape[1]] = part
        return scores

    def tokens(
        self,
        model: Module,
        examples: object,
        queries: Iterable[object],
        loss_fn: LossFn,
        damping: float = 0.1,
        curvature: Curvature = "fisher",
    ) -> tuple[Tensor, Tensor]:
        """Which positions of an example its influence comes from: `[Q, B, T]` shares, and `[Q, B]` the rest.

        The share of a position is what flows through the weights' use there; the rest is that of weights which have
        no positions (biases, norms). Shares and rest add up to the influence of the example, by unrounded rows. The
        model is run on the examples again, so that they need not be those of the index. Influence is symmetric: with
        a training batch for `queries` and a query for `examples`, the shares are those of the query's positions.

        Args:
            model: the checkpoint that was indexed.
            examples: one batch as `loss_fn` takes it, B rows.
            queries: batches; each row of dimension 0 is one query.
            loss_fn: as in `build`.
            damping: λ in mean eigenvalues of each layer.
            curvature: as in `influence`.

        Raises:
            InputError: an argument that is not understood, or a model that is not the indexed one.
        """
        directions = self._directions(model, queries, loss_fn, damping, curvature)
        projector, reduction = self._projector(model), self._header.reduction
        return token_scores(projector, model, loss_fn, examples, rows_of(examples), reduction, directions)

    def tune(
        self,
        model: Module,
        queries: Iterable[object],
        loss_fn: LossFn,
        truth: SubsetTruth,
        dampings: Sequence[float] | None = None,
        curvatures: Sequence[Curvature] | None = None,
        ranks: Sequence[int | None] = (None,),
    ) -> Tuning:
        """Sweep damping, curvature and rank against retraining on subsets, and recommend.

        One pass over the rows, whatever the number of settings.

        Args:
            model: the checkpoint that was indexed.
            queries: batches; each row of dimension 0 is one query.
            loss_fn: as in `build`.
            truth: retrainings on subsets of the indexed examples, in the order of the rows, evaluated at these queries
                (`assay.evaluate.subset_truth`).
            dampings: to be tried, in mean eigenvalues of each layer; by default 0.001 to 10.
            curvatures: to be tried; by default all that this index has.
            ranks: to be tried, up to that of the index; None is that of the index.

        Raises:
            InputError: the truth is of other examples or queries, or a curvature is not to be had.
        """
        from assay.index.tune import DAMPINGS, sums_over_subsets, sweep

        rows = self._query_rows(model, queries, loss_fn)
        weights = weights_named(model, self._header.shapes)
        blocks = {
            kind: load_blocks(self._folder, self._header, kind) for kind in curvatures or self.curvatures
        }
        return sweep(
            self._header.layers, sides_of(self._folder, self._header, weights), blocks, rows,
            sums_over_subsets(self._rows, truth.kept), truth, DAMPINGS if dampings is None else dampings, ranks,
            random=self._header.projection.kind == "random",
        )  # fmt: skip

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        """What `curvature=` can be for this index."""
        return available(self._folder, self._header)

    def search(
        self,
        model: Module,
        queries: Iterable[object],
        loss_fn: LossFn,
        k: int = 10,
        damping: float = 0.1,
        normalize: Normalize | None = None,
        curvature: Curvature = "fisher",
        workers: Workers | None = None,
    ) -> pl.DataFrame:
        """The k most helpful rows for each query: `query, rank, id, score`, rank 1 the most helpful.

        Rows stream through; memory does not grow with their number. `workers` go through ranges of the rows, each in a
        process of its own; the other arguments are those of `influence`.

        Raises:
            InputError: an argument that is not understood, or a model that is not the indexed one.
            StoreError: a shard is damaged or missing; its file is named.
        """
        if not isinstance(k, int) or k < 1:
            raise InputError(f"search(k={k!r}): k must be a positive whole number.")
        directions = self._directions(model, queries, loss_fn, damping, curvature)
        own = self._self_influence(damping, curvature) if normalize == "relatif" else None
        if workers is None or workers.number == 1:
            best, rows = best_rows(self._rows, directions, k, normalize, own)
        else:
            place = self._folder.below("rows").place
            best, rows = best_by(workers, place, self._rows, directions, k, normalize, own)
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
        return formula.precondition(self._query_rows(model, queries, loss_fn))

    def _query_rows(self, model: Module, queries: Iterable[object], loss_fn: LossFn) -> Tensor:
        """`[Q, width]`: q̂."""
        projector, reduction = self._projector(model), self._header.reduction
        rows = [projector.rows(model, loss_fn, batch, rows_of(batch), reduction) for batch in queries]
        if not rows:
            raise InputError("queries: there is none; give at least one batch.")
        dtype = torch.float64 if self._header.dtype == "fp64" else torch.float32
        return torch.cat(rows).to(dtype).cpu()

    def _projector(self, model: Module) -> Projector:
        weights = weights_named(model, self._header.shapes)
        if not self._warned and fingerprint(weights) != self._header.fingerprint:
            self._warned = True
            warnings.warn(
                "the model's weights are not those that were indexed: scores compare two different checkpoints.",
                AssayWarning,
                stacklevel=4,
            )
        return Projector(weights, sides_of(self._folder, self._header, weights))

    def _self_influence(self, damping: float, curvature: Curvature) -> Tensor:
        """`[N]`, kept for the last damping."""
        if self._own is None or self._own[:2] != (curvature, damping):
            formula = self._influence_function(damping, curvature)
            parts = [formula.self_influence(piece) for _, piece in self._rows.pieces()]
            self._own = curvature, damping, torch.cat(parts)
        return self._own[2]


def _settings(
    projection: Projection | None, dtype: RowDtype, reduction: Reduction, check: str, shard: int | None
) -> tuple[Projection, RowDtype, Reduction, str, int | None]:
    """The settings of a build, looked at.

    Raises:
        InputError: one that is not known.
    """
    if check not in ("first", "off"):
        raise InputError(f"Index.build(check={check!r}) is not known; choose 'first' or 'off'.")
    if reduction not in ("mean", "sum"):
        raise InputError(f"Index.build(reduction={reduction!r}) is not known; choose 'mean' or 'sum'.")
    return projection or Projection(), dtype, reduction, check, shard


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
