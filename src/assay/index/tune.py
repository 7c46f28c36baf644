"""Which damping, curvature and rank to take: every setting against retraining on subsets.

The sum of the scores of a group is linear in the rows, so that one pass over the index gives what every setting is
then judged by: Σ_{i ∈ S} ĝ_i of each subset. A smaller rank is the leading part of a larger one: the first principal
axes, or the first rows of a Gaussian matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from assay.capture.sides import Sides
from assay.curvature import Block, Diagonal, Fisher
from assay.errors import InputError
from assay.index.curvature import Curvature
from assay.methods.influence import InfluenceFunction
from assay.projection import Layer
from assay.rows import RowReader

if TYPE_CHECKING:
    from assay.evaluate.intervals import Score
    from assay.evaluate.subsets import SubsetTruth

__all__ = ["DAMPINGS", "Reduced", "Tuning", "sums_over_subsets", "sweep"]

DAMPINGS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
Blocks = Mapping[str, Block] | None


@dataclass(frozen=True)
class Tuning:
    """What a sweep found.

    Args:
        table: `curvature, rank, damping, score, low, high`: the linear datamodeling score of every setting with its
            interval over the queries, the best first. rank is null for that of the index.
        held_out: the score of choosing on one half of the queries and looking at the other, both ways round: what to
            expect of the recommendation on queries that nobody tuned on.
    """

    table: pl.DataFrame
    held_out: Score

    @property
    def curvature(self) -> Curvature:
        """The recommended curvature."""
        return self.table["curvature"][0]  # type: ignore[no-any-return]

    @property
    def damping(self) -> float:
        """The recommended damping, in mean eigenvalues of each layer."""
        return float(self.table["damping"][0])

    @property
    def rank(self) -> int | None:
        """The recommended rank; None for that of the index. A smaller one needs an index of its own to save space."""
        return self.table["rank"][0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Reduced:
    """The leading part of every projection.

    Args:
        columns: of a row that are kept.
        scale: `[columns]`, of these.
        layers: where each layer's kept entries stand.
        inside: the kept entries of each layer's own columns, by layer.
    """

    columns: Tensor
    scale: Tensor
    layers: tuple[Layer, ...]
    inside: Mapping[str, Tensor]

    @classmethod
    def of(cls, layers: Sequence[Layer], sides: Mapping[str, Sides], rank: int, random: bool) -> Reduced:
        """The first `rank` rows of each projection that has more."""
        columns, scales, found, inside = [], [], [], {}
        start = 0
        for layer in layers:
            own, at = [], 0
            for name in layer.params:
                r0, r1 = sides[name].ranks
                sketch = sides[name].entries is not None
                k0 = min(rank, r0) if sketch or sides[name].left is not None else r0
                k1 = min(rank, r1) if sketch or sides[name].right is not None else r1
                grid = torch.arange(k0)[:, None] * r1 + torch.arange(k1)
                own.append(at + grid.flatten())
                # E[PᵀP] = I for the shorter Gaussian matrix too
                scale = ((r0 / k0) * (r1 / k1)) ** 0.5 if random else 1.0
                scales.append(torch.full((k0 * k1,), scale))
                at += r0 * r1
            inside[layer.name] = torch.cat(own)
            columns.append(layer.start + inside[layer.name])
            width = len(inside[layer.name])
            found.append(Layer(layer.name, start, start + width, layer.params))
            start += width
        return cls(torch.cat(columns), torch.cat(scales), tuple(found), inside)

    def rows(self, rows: Tensor) -> Tensor:
        """`[B, columns]` of rows `[B, width]`."""
        return rows[:, self.columns] * self.scale.to(rows.dtype)

    def blocks(self, blocks: Blocks) -> Blocks:
        """Curvature along the kept directions."""
        if blocks is None:
            return None
        found: dict[str, Block] = {}
        for layer in self.layers:
            block, inside = blocks[layer.name], self.inside[layer.name]
            scale = self.scale[layer.columns].double()
            if isinstance(block, Fisher):
                matrix = block.matrix[inside][:, inside] * torch.outer(scale, scale).to(block.matrix.dtype)
                found[layer.name] = Fisher(matrix, layer.name)
            elif isinstance(block, Diagonal):
                found[layer.name] = Diagonal(block.eigenvalues[inside] * scale.square(), layer.name)
        return found


def sums_over_subsets(rows: RowReader, kept: Tensor) -> Tensor:
    """`[S, width]`: Σ_{i ∈ S} ĝ_i for subsets `[S, N]`, in one pass.

    Raises:
        InputError: the subsets are of another number of examples.
    """
    if kept.shape[1] != len(rows):
        raise InputError(
            f"the truth keeps {kept.shape[1]} examples and the index has {len(rows)}: they must agree."
        )
    total: Tensor | None = None
    for start, piece in rows.pieces():
        part = kept[:, start : start + len(piece)].to(piece.dtype) @ piece
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def sweep(
    layers: Sequence[Layer],
    sides: Mapping[str, Sides],
    blocks: Mapping[Curvature, Blocks],
    queries: Tensor,
    sums: Tensor,
    truth: SubsetTruth,
    dampings: Iterable[float],
    ranks: Iterable[int | None],
    random: bool,
) -> Tuning:
    """Score every setting.

    Args:
        layers: of the index.
        sides: its projections.
        blocks: its curvatures.
        queries: `[Q, width]` projected gradients.
        sums: `[S, width]` of `sums_over_subsets`.
        truth: the retrainings.
        dampings: to be tried.
        ranks: to be tried; None is that of the index.
        random: whether the projection is a random one.

    Raises:
        InputError: there is no setting, or the truth is of other queries.
    """
    if truth.losses.shape[1] != len(queries):
        raise InputError(
            f"the truth has {truth.losses.shape[1]} queries and {len(queries)} were given: they must agree."
        )
    from assay.evaluate.intervals import mean_with_interval  # its baselines import the index
    from assay.evaluate.lds import rank_correlation

    settings, scores = [], []
    for rank, curvature in product(ranks, blocks):
        reduced = None if rank is None else Reduced.of(layers, sides, rank, random)
        own = blocks[curvature] if reduced is None else reduced.blocks(blocks[curvature])
        asked, found = (queries, sums) if reduced is None else (reduced.rows(queries), reduced.rows(sums))
        for damping in dampings if own is not None else (0.0,):  # plain inner products have none
            formula = InfluenceFunction(layers if reduced is None else reduced.layers, own, damping)
            predicted = formula.precondition(asked).double() @ found.double().t()  # [Q, S]
            settings.append((curvature, rank, damping))
            scores.append(rank_correlation(predicted, -truth.losses.t().double()).nan_to_num(0))
    if not scores:
        raise InputError("tune(...): there is nothing to try; give at least one damping, curvature and rank.")
    table = torch.stack(scores)  # [settings, Q]
    intervals = [mean_with_interval(row) for row in table]
    frame = pl.DataFrame(
        [(*setting, x.mean, x.low, x.high) for setting, x in zip(settings, intervals, strict=True)],
        schema={
            "curvature": pl.String, "rank": pl.Int64, "damping": pl.Float64,
            "score": pl.Float64, "low": pl.Float64, "high": pl.Float64,
        },
        orient="row",
    )  # fmt: skip
    return Tuning(frame.sort("score", descending=True, maintain_order=True), _held_out(table))


def _held_out(scores: Tensor) -> Score:
    """`[settings, Q]`: the score on each half of the queries of what was best on the other half."""
    from assay.evaluate.intervals import mean_with_interval

    halves = torch.arange(scores.shape[1]) % 2
    found = torch.empty(scores.shape[1], dtype=scores.dtype)
    for half in (0, 1):
        others = scores[:, halves != half]
        best = int(others.mean(1).argmax()) if others.shape[1] else 0
        found[halves == half] = scores[best, halves == half]
    return mean_with_interval(found)
