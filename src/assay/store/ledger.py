"""The ledger: what every sample was worth, read from a run folder or from a run that still goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from assay.errors import InputError, StoreError
from assay.names import listed, unknown
from assay.store.files import local_path, one_line
from assay.store.schema import rest_column, tokens_column, value_column
from assay.store.shards import open_folders
from assay.store.source import Source
from assay.store.sums import by_column, by_sample, by_token, documents

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer
    from typing_extensions import Unpack

    from assay.embedding import Embeddings
    from assay.replay import AdjointOptions, Batches, Loss, Queries, Smoothness
    from assay.targets import Target
    from assay.workers import Workers


def open_ledger(path: str | Path) -> Ledger:
    """Open the ledger of a run folder.

    A run that is still being written, or that was killed, opens too: the ledger holds what had reached the
    disk by now. Every file's footer is read and checked; `Ledger.verify` reads all of the rest.

    Args:
        path: The `out=` of a run.

    Raises:
        StoreError: No run folder, a damaged file (named), or a format newer than this version of assay.

    Warns:
        AssayWarning: A part is missing.

    Example:
        >>> import tempfile, numpy as np
        >>> from assay.store import RunWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = RunWriter(f"{folder}/run", targets=["code"])
        ...     writer.add_values(0, 0, ["a", "b"], np.array([[0.5], [-0.25]]))
        ...     writer.close()
        ...     open_ledger(f"{folder}/run").values("code").rows()
        [('a', 0.5, 1), ('b', -0.25, 1)]
    """
    return Ledger(open_folders(local_path(path)))


class Ledger:
    """What a run has recorded about its samples and steps.

    Signs and units: a positive value means that the sample lowered the target's loss; values and every line
    of the account are in the unit of that loss. Wherever a method takes a target, it may be left out if the
    run has one target only; a name that the run does not know is an `InputError` that lists the known ones.

    Obtained from `open_ledger` or from a writer; one obtained from a writer sees whatever is added later.

    Args:
        source: Where the tables come from.

    Example:
        >>> import numpy as np, polars as pl
        >>> from assay.store import RunWriter
        >>> writer = RunWriter(None, targets=["code"])
        >>> writer.add_values(0, 0, [7, 8], np.array([[0.5], [-0.25]]))
        >>> writer.add_values(1, 0, [7, 9], np.array([[1.0], [0.25]]))
        >>> ledger = writer.ledger
        >>> ledger.values().rows()
        [(7, 1.5, 2), (9, 0.25, 1), (8, -0.25, 1)]
        >>> writer.add_metadata(pl.DataFrame({"id": [7, 8, 9], "domain": ["law", "law", "math"]}))
        >>> ledger.by("domain").rows()
        [('law', 1.25, 2, 0.5, 0.625), ('math', 0.25, 1, 0.0, 0.25)]
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def targets(self) -> list[str]:
        """Names of the run's targets."""
        return list(self._source.header.targets)

    @property
    def info(self) -> dict[str, Any]:
        """The JSON object that the run's writer left, a copy."""
        return copy.deepcopy(self._source.header.info)

    @property
    def path(self) -> Path | None:
        """The run folder, None for a run in memory."""
        return self._source.path

    @property
    def tables(self) -> list[str]:
        """Names that `table` knows."""
        return sorted(self._side())

    def values(self, target: str | None = None, *, even: bool = False) -> pl.DataFrame:
        """Value of every sample over the whole run.

        A sample that was seen several times adds up. A row whose value is not finite (a step with NaN, which
        the account marks) adds nothing, but its step counts as seen.

        Args:
            target: Name of the target.
            even: Divide each value by the mean size of its step's first, so that all steps weigh alike: for the
                question which samples stand behind a target, whenever they came. Adam's first steps, and those of a
                high learning rate, move a loss most, whatever they are fed. Such values have no unit, and do not add
                up to the fall of the loss.

        Returns:
            Frame `id`, `value` (float64, positive = lowered the loss), `steps` (number of different
            optimizer steps in which the sample was seen), the largest value first, equal values by id.
        """
        return self._collect(by_sample(self._rows(target, "micro"), even))

    def steps(self, target: str | None = None, first: int = 0) -> pl.DataFrame:
        """Value of every sample at every step.

        Args:
            target: Name of the target.
            first: Leave out the steps before this one.

        Returns:
            Frame `step`, `id`, `value`, one row per sample and micro-batch in the order of recording; NaN is
            kept.
        """
        rows = self._rows(target)
        return self._collect(rows.filter(pl.col("step") >= first) if first > 0 else rows)

    def tokens(
        self, target: str | None = None, id: int | str | None = None, step: int | None = None
    ) -> pl.DataFrame:
        """Values by token, of a run with `InRunShapley(granularity="token")`.

        Args:
            target: Name of the target.
            id: Of one sample; left out, all samples.
            step: One step; left out, the whole run.

        Returns:
            Frame `id`, `token`, `value`, `steps`: the value of each position of a sample, summed over the steps in
            which it was seen. The row whose token is null is the part that flows through uses of weights without a
            position. A sample's rows add up to its value.

        Raises:
            InputError: The run has no values by token.
        """
        name = self._target(target)
        rows = self._details("tokens", "InRunShapley(granularity='token')")
        if step is not None:
            rows = rows.filter(pl.col("step") == step)
        if id is not None:
            rows = rows.filter(pl.col("id") == id)
        rows = rows.select("step", "id", value=pl.col(tokens_column(name)), rest=pl.col(rest_column(name)))
        return self._collect(by_token(rows))

    def norms(self) -> pl.DataFrame:
        """Norms of the samples' gradients, of a run with `GradientNorms`.

        Returns:
            Frame `step`, `id`, `norm` (‖g_i‖), `cosine` (with the gradient that the optimizer received) and, for
            every target of that method, `cosine:TARGET` (positive: a step along the sample's gradient lowers the
            target's loss), one row per sample and micro-batch. A cosine is null where a gradient is zero.

        Raises:
            InputError: The run has no norms.
        """
        return self._collect(
            self._details("norms", "GradientNorms()").select("step", pl.exclude("step", "micro"))
        )

    def _details(self, table: str, method: str) -> pl.LazyFrame:
        rows = self._source.rows(table)
        if rows is None:
            raise InputError(f"this run has no {table}: record it with methods=[assay.{method}]")
        return rows

    def account(self, target: str | None = None) -> pl.DataFrame:
        """How much of each step's change of the loss the values explain.

        Args:
            target: Name of the target.

        Returns:
            Frame `step`, `predicted` (the step's values, summed), `carried` (momentum of earlier steps),
            `decayed` (weight decay), `actual` (the loss's measured fall), `residual`, `status`: "ok", "nan"
            or "skipped".
        """
        name = self._target(target)
        account = self._source.account()
        return self._collect(account.filter(pl.col("target") == name).drop("target"))

    def explained(self, target: str | None = None) -> float:
        """Share of the actual fall of the loss that the account explains.

        Sum of predicted + carried + decayed over sum of actual, over the steps whose status is "ok" and whose
        four numbers are all known.

        Args:
            target: Name of the target.

        Returns:
            The share, 1.0 where the account closes; NaN where no step counts or the loss did not change.
        """
        numbers = ["predicted", "carried", "decayed", "actual"]
        ok = self.account(target).filter(
            pl.col("status") == "ok", pl.all_horizontal(pl.col(numbers).is_finite())
        )
        predicted, carried, decayed, actual = (math.fsum(ok[name]) for name in numbers)
        return (predicted + carried + decayed) / actual if actual else math.nan

    def by(self, column: str, target: str | None = None) -> pl.DataFrame:
        """Values grouped by a column of the metadata.

        Samples without metadata are one group too, named null, so that the sums add up to the run's.

        Args:
            column: A column of the metadata.
            target: Name of the target.

        Returns:
            Frame `column`, `value` (sum over the group's samples), `samples` (how many), `negative` (share
            of them with a value below zero), `mean` (value per sample), the largest sum first.
        """
        self._target(target)
        metadata = self._source.metadata()
        with self._reading():
            types = metadata.collect_schema()
        known = [name for name in types if name != "id"]
        if column not in known:
            raise unknown("metadata column", column, known, "add_metadata gives samples their columns")
        if types[column].is_nested():
            raise InputError(f"metadata column {column!r} has type {types[column]}: group by a plain column")
        if column in ("value", "samples", "negative", "mean"):
            raise InputError(
                f"metadata column {column!r} has the name of a result: rename it in the metadata"
            )
        return self._collect(by_column(by_sample(self._rows(target, "micro")), metadata, column))

    def metadata(self) -> pl.DataFrame:
        """The metadata: a frame with `id` and the columns that were given, one row per sample."""
        return self._collect(self._source.metadata())

    def table(self, name: str) -> pl.DataFrame:
        """A side table, such as the loss curve, as it was last given."""
        side = self._side()
        if name not in side:
            raise unknown("table", name, side, "add_table makes one")
        return self._collect(side[name])

    def value_for(
        self, target: Target, model: Module, path: Literal["left", "trapezoid"] = "left"
    ) -> pl.DataFrame:
        """In-run values for a target that did not exist while the model trained.

        From the gradients that `DataValueEmbedding` recorded and the snapshots of `Run(..., snapshots="auto")`: exact
        up to the projection and to the way from one snapshot to the next.

        Args:
            target: What the samples are valued for.
            model: Of the run's architecture; its weights are put back afterwards.
            path: "left" or "trapezoid", as for `InRunShapley`.

        Returns:
            Frame `step`, `id`, `value` in the unit of the target's loss, positive = lowered it, one row per sample and
            step; `group_by("id").sum()` gives the values over the run.

        Raises:
            InputError: The run recorded no gradients or took no snapshots.
            StoreError: A file is damaged; it is named.
        """
        from assay.embedding.values import value_for

        return value_for(self._source.gradients, self._source.snapshots, model, target, path)

    def embeddings(
        self,
        segments: int = 1,
        curvature: Literal["fisher", "ggn"] = "fisher",
        *,
        blocks: Literal["layer", "all"] = "layer",
        momentum: bool = True,
        workers: int | Workers = 1,
    ) -> Embeddings:
        """Data value embeddings of the run: what if a sample had been left out at that step?

        Built from the recorded gradients at the first call, and kept below the run's folder.

        Args:
            segments: the run is cut into as many, which may be gone through in parallel; where one ends, a checkpoint
                can be looked at (`at_step=`). The final embeddings do not depend on it.
            curvature: "fisher" as published, or "ggn" if the run recorded the Gauss-Newton matrix.
            blocks: "layer" as published, or "all" for one block over all layers: better, and dearer by the number of
                layers.
            momentum: take the momentum buffer into the state.
            workers: processes of this machine that build, or `assay.integrations.ray.RayWorkers`; a run in memory is
                built in this one.

        Raises:
            InputError: The run recorded no gradients, or an argument is not understood.
            StoreError: A file is damaged; it is named.
        """
        from assay.embedding import Embeddings

        return Embeddings(self._source.gradients, segments, curvature, blocks, momentum, workers)

    @property
    def rows(self) -> pl.DataFrame:
        """Frame `step`, `id`: one row per sample and step, as `adjoint` and `embeddings` value them.

        Raises:
            StoreError: The run took no snapshots and recorded no gradients, or a file is damaged.
        """
        from assay.embedding.recorded import Recorded
        from assay.replay import Trajectory

        if (
            not self._source.snapshots.numbers("log")
            and self._source.gradients.read("header.json") is not None
        ):
            return Recorded(self._source.gradients).table
        return Trajectory(self._source.snapshots).rows()

    def adjoint(
        self,
        model: Module,
        optimizer: Optimizer,
        batches_of_step: Batches,
        loss_fn: Loss,
        queries: Queries,
        **options: Unpack[AdjointOptions],
    ) -> Tensor:
        """The exact answer: what leaving a sample out of a step does to each query's loss after training.

        The run is replayed backwards from its snapshots (`Run(..., snapshots="auto")`), through the optimizer's whole
        state; exact to first order in leaving the sample out. The formulas stand in `assay.replay.backward`, the
        options in `assay.replay.AdjointOptions`. An adjoint that was killed goes on where it was, if it is called
        again with the same arguments.

        Args:
            model: Of the run's architecture; its weights are put back afterwards.
            optimizer: Of the run's kind, over the model's parameters: SGD, Adam or AdamW.
            batches_of_step: From a step's number to its micro-batches, a list of `(ids, batch)`.
            loss_fn: `loss_fn(model, batch)`, the loss that was differentiated. Whether it was divided by the number of
                micro-batches is found out.
            queries: Batches, or name → `Target`.
            options: See `assay.replay.AdjointOptions`.

        Returns:
            `[queries, rows]`, rows as in `rows`, in the unit of the query's loss; positive = it would be higher without
            the sample at that step. NaN for steps that were not asked for.

        Raises:
            InputError: The replay is not the run (the step and the likely cause are named), or an argument cannot be
                used.
            UnsupportedOptimizerError: Another optimizer.
            StoreError: The run took no snapshots, or one is damaged.

        Example:
            >>> import torch, assay
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            >>> data = [(["a", "b"], torch.randn(2, 2)), (["c", "a"], torch.randn(2, 2))]
            >>> def loss_fn(model, x):
            ...     return model(x).square().mean()
            >>> with assay.Run(model, optimizer, snapshots="auto") as run:
            ...     for ids, x in data:
            ...         with run.step(ids):
            ...             loss_fn(model, x).backward()
            ...         optimizer.step()
            ...         optimizer.zero_grad()
            >>> ledger = run.ledger
            >>> ledger.adjoint(model, optimizer, lambda step: [data[step]], loss_fn, [torch.ones(1, 2)]).shape
            torch.Size([1, 4])
            >>> ledger.rows.rows()
            [(0, 'a'), (0, 'b'), (1, 'c'), (1, 'a')]
        """
        from assay.replay import adjoint

        return adjoint(self._source.snapshots, model, optimizer, batches_of_step, loss_fn, queries, **options)

    def metasmoothness(
        self,
        model: Module,
        optimizer: Optimizer,
        batches_of_step: Batches,
        loss_fn: Loss,
        queries: Queries,
        h: float = 0.01,
        seed: int = 0,
    ) -> Smoothness:
        """Whether this training's outcome is smooth enough in the weights of its data for `adjoint` to mean something.

        Trains the run again three times from its first snapshot, the micro-batches weighted by 1 + h v with random
        signs v; the definition stands in `assay.replay.smoothness`.

        Args:
            model: As in `adjoint`, like the arguments that follow.
            optimizer: See there.
            batches_of_step: See there.
            loss_fn: See there.
            queries: See there.
            h: How far the weights move.
            seed: Of the signs.

        Returns:
            `score` (1 = smooth), `ratios` (by query, 1 = linear) and `advice`, empty where the run is smooth.

        Raises:
            InputError: The replay is not the run.
            StoreError: The run took no snapshots.
        """
        from assay.replay import metasmoothness

        return metasmoothness(
            self._source.snapshots, model, optimizer, batches_of_step, loss_fn, queries, h, seed
        )

    def agreement(
        self,
        exact: Tensor,
        others: Mapping[str, Tensor] | None = None,
        targets: Sequence[str] | None = None,
    ) -> pl.DataFrame:
        """Which cheaper method to trust on this run: rank correlations with the exact answer.

        Args:
            exact: `[queries, rows]`, of `adjoint`; rows that are NaN are left out.
            others: Name → `[queries, rows]` of other methods, or `[queries, ids]` with one column per id in the order
                of first appearance in `rows` (influence functions know no steps). The values that the run recorded
                are compared too, where the queries are its targets: `exact` must then be that of the targets, in
                their order, or `targets` names them.
            targets: Names of the queries; the run's targets by default, where there are as many.

        Returns:
            Frame `method`, `query`, `by_step` (Spearman over the rows; null where a method knows no steps), `by_id`
            (Spearman over the samples, their rows summed), best first.

        Raises:
            InputError: Shapes that do not fit.
        """
        from assay.replay import agreement

        return agreement(self, exact, others or {}, targets)

    def verify(self) -> None:
        """Read all that lies on the disk and compare the checksum of every page.

        Raises:
            StoreError: The first damaged file, by name.
        """
        self._source.verify()

    def _side(self) -> dict[str, pl.LazyFrame]:
        packed = self._source.rows("packed")
        return self._source.side() | ({} if packed is None else {"packed": documents(packed)})

    def _rows(self, target: str | None, *more: str) -> pl.LazyFrame:
        value = pl.col(value_column(self._target(target))).alias("value")
        return self._source.values().select("step", "id", value, *more)

    def _target(self, target: str | None) -> str:
        known = self._source.header.targets
        if target is None and len(known) == 1:
            return known[0]
        if target is None:
            raise InputError(f"this run has {len(known)} targets ({listed(known)}): name one")
        if target not in known:
            raise unknown("target", target, known, "it was recorded with none")
        return target

    def _collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        with self._reading():
            return frame.collect()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what the reader of Parquet says into one line, with the name of a damaged file."""
        try:
            yield
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            self._source.verify()
            raise StoreError(
                f"the run cannot be read ({one_line(error)}): check its disk, then open it again"
            ) from error
