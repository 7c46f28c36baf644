"""The factored gradients of a use as those of a parameter itself, and of the sub-matrix that its projections read.

What is read of a gradient is small, so that it can wait for the optimizer's diagonal where the whole would be large.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import Parameter

from assay.capture.factors import Apart, Dense, Directional, Factors, Lookup, Outer, Patches
from assay.capture.forms import dense, scattered
from assay.capture.layout import Layout
from assay.capture.marks import Weight
from assay.capture.sides import Sides, chosen

__all__ = ["narrowed", "of_parameter", "owned"]


def of_parameter(weight: Weight, factors: Factors, param: Parameter) -> Factors | None:
    """The factors as those of the parameter itself; None where the weight is computed from it in another way."""
    if weight.rows is None:
        return _in_own_orientation(weight, factors, param)
    rows = weight.rows
    if isinstance(factors, Apart) and rows.shape == factors.b.shape[:-1]:
        return Lookup(rows, factors.b, factors.layout)
    if isinstance(factors, Dense):  # the rows are the same for all samples
        batch = len(factors.gradients)
        return Lookup(rows.expand(batch, *rows.shape), factors.gradients, Layout(0, batch))
    return None


def _in_own_orientation(weight: Weight, factors: Factors, param: Parameter) -> Factors | None:
    """The factors as those of the parameter itself, where the used tensor is it, a cast or its transpose."""
    if isinstance(factors, (Dense, Outer, Lookup, Directional)):
        itself = param.detach()[None]
        if next(iter(weight.push({param: itself}).values()), None) is itself:
            return factors
        generator = torch.Generator(device=param.device).manual_seed(0)
        G = torch.randn(1, *param.shape, generator=generator, dtype=param.dtype, device=param.device)
        ((_, pushed),) = weight.push({param: G}).items()  # a random direction that comes back unchanged tells
        if pushed.shape == G.shape and torch.equal(pushed, G.to(pushed.dtype)):
            return factors
        if param.dim() == 2 and pushed.shape == G.mT.shape and torch.equal(pushed, G.mT.to(pushed.dtype)):
            if isinstance(factors, Outer):
                return Outer(factors.a, factors.b, factors.layout, not factors.transposed)
            if isinstance(factors, Dense):
                return Dense(factors.gradients.mT)
    return None


def narrowed(factors: Factors, sides: Sides) -> Factors | None:
    """The gradients of the sub-matrix that is read, as of a parameter of the shape of `sides.within`.

    Args:
        factors: of the parameter itself.
        sides: what is read of it.

    Returns:
        None for factors that answer inner products only.
    """
    if not sides.narrow:
        return factors
    if isinstance(factors, Outer):
        left, right = (factors.a, factors.b) if factors.transposed else (factors.b, factors.a)
        return Outer(chosen(right, sides.columns), chosen(left, sides.rows), factors.layout)
    if isinstance(factors, Lookup):
        return _of_rows(factors, sides)
    if isinstance(factors, Patches):  # a matrix of ones and zeros is a kernel as good as any
        one = replace(sides, left=None, right=None).whole()
        return Dense(factors.projected(one.left, one.right))
    g = dense(factors)
    return None if g is None else Dense(sides.read(g.reshape(len(g), *sides.matrix)))


def _of_rows(factors: Lookup, sides: Sides) -> Lookup:
    """Of a table's rows those that are read; what was looked up elsewhere has no gradient there."""
    indices, b = factors.indices, chosen(factors.b, sides.columns)
    if sides.rows is not None:
        places = torch.full((sides.matrix[0],), -1, device=indices.device)
        places[sides.rows] = torch.arange(len(sides.rows), device=indices.device)
        indices = places[indices]
        b = b * (indices >= 0)[..., None].to(b.dtype)
        indices = indices.clamp_min(0)
    return Lookup(indices, b, factors.layout)


def owned(factors: Factors, shape: tuple[int, int]) -> Factors | None:
    """The same in the smaller form and in memory of its own, so that it can wait; None as in `narrowed`.

    Args:
        factors: as `narrowed` gives them.
        shape: of the sub-matrix. What was looked up is written out where that is at most four times as much, since
            several uses of a table can then be added up.
    """
    if isinstance(factors, Lookup):
        b, layout = factors.b, factors.layout
        if layout.batch * shape[0] * shape[1] > 4 * b.numel():
            return replace(factors, indices=factors.indices.clone(), b=b.clone())
        wide = b.to(torch.promote_types(b.dtype, torch.float32))
        return Dense(scattered(factors.indices, wide, layout, shape[0]))
    if isinstance(factors, Outer):
        p, d = factors.b.shape[-1], factors.a.shape[-1]
        if factors.layout.batch * p * d > factors.a.numel() + factors.b.numel():
            return replace(factors, a=factors.a.clone(), b=factors.b.clone())
    g = dense(factors)
    if g is None:
        return None
    g = g.reshape(len(g), *shape)
    return Dense(g.clone() if isinstance(factors, Dense) else g)
