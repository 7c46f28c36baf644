"""Which projection each parameter of a recording gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.bottleneck import stream_factors
from assay.capture.sides import Sides
from assay.curvature import Covariances
from assay.embedding.header import draw_sides
from assay.errors import InputError
from assay.index.index import rows_of
from assay.methods.base import Context
from assay.projection import vocabularies

if TYPE_CHECKING:
    from assay.methods.embedding import DataValueEmbedding

__all__ = ["balanced", "choose_sides"]

Ranks = dict[str, int | None]


def choose_sides(method: DataValueEmbedding, context: Context) -> tuple[Ranks, dict[str, Sides]]:
    """Each parameter's rank and projections, by name.

    Raises:
        InputError: a rank for a parameter that is not watched, or a budget below one number per parameter.
    """
    params = {name: p for p, name in context.weights.names.items()}
    unknown = sorted(set(method.ranks) - set(params))
    if unknown:
        raise InputError(
            f"DataValueEmbedding(ranks=...): the run watches no parameter {unknown[0]!r}; "
            "take a name of run.coverage()."
        )
    rank = method.projection.rank if method.projection.kind != "none" else None
    if method.budget is not None:
        rank = _rank_within(method.budget, params, method.ranks)
    ranks: Ranks = {name: method.ranks.get(name, rank) for name in params}
    if method.projection.kind != "pca":
        return ranks, draw_sides(params, method.projection, ranks, vocabularies(context.model))
    return ranks, _principal(method, context, ranks)


def balanced(
    sides: dict[str, Sides], through: Mapping[str, Tensor | float]
) -> tuple[dict[str, Sides], dict[str, Sides]]:
    """Projections for x and for D x between which inner products have least noise: P R x and P R⁻¹ D x.

    ⟨R x, R⁻¹ D y⟩ = ⟨x, D y⟩ for any diagonal R, but the noise of the projection grows with ‖R x‖ ‖R⁻¹ D y‖, and under
    Adam D is huge wherever gradients are small. R = √D balances the two; it is taken as a product over rows and
    columns, as Adafactor takes the second moment, so that it is part of the projection's two sides and costs nothing.

    Args:
        sides: by name.
        through: D by name, at the first step; its floor of a tenth of the mean covers what had no gradient yet.
    """
    plain, inverse = dict(sides), dict(sides)
    for name, own in sides.items():
        D = through.get(name)
        matrices = (own.left, own.right, own.entries)
        if not isinstance(D, Tensor) or all(matrix is None for matrix in matrices):
            continue
        size = D.detach().double().cpu().reciprocal().reshape(own.matrix)  # √v̂ + ε
        mean = size.mean()
        rows = (size.mean(1) + 0.1 * mean).clamp_min(1e-30).rsqrt()
        columns = (
            (size.mean(0) / mean + 0.1).clamp_min(1e-30).rsqrt() if mean > 0 else torch.ones(own.matrix[1])
        )
        rows, columns = (
            x if read is None else x[read] for x, read in ((rows, own.rows), (columns, own.columns))
        )
        if own.entries is not None and own.signs is not None:
            R = (rows[:, None] * columns).flatten()[own.entries]
            plain[name] = replace(own, signs=(own.signs * R).float())
            inverse[name] = replace(own, signs=(own.signs / R).float())
            continue
        left, right = (
            torch.eye(n, dtype=torch.float64) if matrix is None else matrix.double()
            for n, matrix in zip(own.within.matrix, (own.left, own.right), strict=True)
        )
        for into, r, c in ((plain, rows, columns), (inverse, 1 / rows, 1 / columns)):
            if own.matrix[1] == 1:  # a vector stays one product for all samples
                into[name] = replace(own, left=(left * r * c).float(), right=None)
            else:
                into[name] = replace(own, left=(left * r).float(), right=(right * c).float())
    return plain, inverse


def _rank_within(budget: int, params: dict[str, Parameter], given: dict[str, int]) -> int:
    """The largest rank whose rows have at most `budget` entries."""

    def entries(rank: int) -> int:
        total = 0
        for name, p in params.items():
            rows, columns = Sides(tuple(p.shape)).matrix
            own = given.get(name, rank)
            total += min(rows, own) * min(columns, own)
        return total

    widest = max(max(Sides(tuple(p.shape)).matrix) for p in params.values())
    if entries(1) > budget:
        raise InputError(
            f"DataValueEmbedding(budget={budget}): rank 1 takes {entries(1)} numbers already; give at least as many."
        )
    low, high = 1, widest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if entries(middle) <= budget else (low, middle - 1)
    return low


def _principal(method: DataValueEmbedding, context: Context, ranks: Ranks) -> dict[str, Sides]:
    """The leading axes of the covariances over the given examples; random ones for sides without a covariance."""
    assert method.axes is not None
    weights = context.weights
    params = {name: p for p, name in weights.names.items()}
    found = Covariances(weights, {name: Sides(tuple(p.shape)) for name, p in params.items()})
    for batch in method.axes.batches:
        size = rows_of(batch)
        stream_factors(
            context.model,
            weights,
            method.axes.loss,
            batch,
            size,
            partial(found.add, scale=float(size)),
        )
        found.examples += size
    like = replace(method.projection, rank=method.projection.rank or 64)
    full = {name: rank or 64 for name, rank in ranks.items()}
    random = draw_sides(params, like, full, vocabularies(context.model))
    by_rank = {rank: found.sides(rank, random) for rank in set(ranks.values())}
    return {name: by_rank[rank][name] for name, rank in ranks.items()}
