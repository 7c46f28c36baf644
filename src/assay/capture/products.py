"""Inner products of the per-sample gradients of a use with directions, through whatever the directions are held as."""

from __future__ import annotations

from math import prod

from torch import Tensor

from assay.capture import pairs
from assay.capture.factors import Factors, Lookup, Outer
from assay.capture.held import Held, number_of
from assay.capture.marks import Directions, Weight
from assay.capture.rounding import Rounded

__all__ = ["contract", "products", "through_pairs"]


def contract(kept: list[tuple[Weight, Factors]], directions: Directions, like: Tensor) -> Tensor:
    """`[groups, targets, B]`: the inner products of kept gradients with directions that became known later.

    Args:
        kept: what the capture kept of one micro-batch.
        directions: `{parameter: [targets, *shape]}`.
        like: the micro-batch's own scores, `[groups, any, B]`.
    """
    scores = like.new_zeros(like.shape[0], number_of(directions), like.shape[2])
    for weight, factors in kept:
        for group, found in products(weight, factors, directions).items():
            scores[group] += found
    return scores


def products(weight: Weight, factors: Factors, directions: Directions) -> dict[int, Tensor]:
    """`{group: [targets, B]}`: ⟨g_i, G_n⟩ of one use."""
    short = through_pairs(weight, factors, directions)
    if short is not None:
        return short
    return {group: factors.dot(pushed) for group, pushed in weight.push(directions).items()}


def through_pairs(
    weight: Weight, factors: Factors, directions: Directions | None, rides: bool = False
) -> dict[int, Tensor] | None:
    """The same without writing the directions out; None where that is not to be had, or takes longer.

    Args:
        weight: the use's weight.
        factors: its per-sample gradients.
        directions: G.
        rides: the weight's own gradient is formed as well.
    """
    if not isinstance(directions, Held) or weight.derived or len(weight.params) != 1:
        return None
    factors = factors.widened() if isinstance(factors, Rounded) else factors
    if not isinstance(factors, (Outer, Lookup)):
        return None
    (param,) = weight.params
    held = directions.pairs(param)
    if held is None:
        return None
    left, right = sides(factors)
    batch, positions = factors.layout.batch, prod(right.shape[:-1]) // max(factors.layout.batch, 1)
    if not pairs.are_cheaper(batch, positions, param.shape, held, right.device.type, rides):
        return None
    ((group, _),) = weight.push({param: right}).items()  # which one is all that is asked
    return {group: pairs.products(left, right, factors.layout, held)}


def sides(factors: Outer | Lookup) -> tuple[Tensor, Tensor]:
    """What multiplies the rows of the weight (`[…, rows]`, or `[…]` looked up) and its columns, `[…, columns]`."""
    if isinstance(factors, Lookup):
        return factors.indices, factors.b
    return (factors.a, factors.b) if factors.transposed else (factors.b, factors.a)
