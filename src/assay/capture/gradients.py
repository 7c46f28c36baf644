"""Norms of per-sample gradients from the factored form in which a capture keeps them.

‖g_i‖² is no sum over the uses of a weight: a tied weight's uses interfere. So each parameter's gradients are added up
over all its uses, written out for as many samples at a time as fit into a block. A linear layer that is used once needs
no writing out where its sequences are short: ‖Σ_t b_t ⊗ a_t‖² = Σ_tt' (a_t·a_t')(b_t·b_t').
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.bottleneck import projected
from assay.capture.factors import Dense, Directional, Elementwise, Factors, Lookup, Outer
from assay.capture.layout import Layout
from assay.capture.marks import Weight
from assay.capture.rounding import Rounded
from assay.capture.sides import Sides
from assay.capture.tokens import ByToken
from assay.errors import CoverageError

__all__ = ["squared_norms"]

ENTRIES = 1 << 25  # of the gradients that are written out at once


@torch.no_grad()
def squared_norms(
    kept: Iterable[tuple[Weight, Factors]], names: Mapping[Parameter, str], batch: int
) -> dict[Parameter, Tensor]:
    """`{parameter: [B]}`: ‖g_i‖² of each parameter that was used.

    Args:
        kept: what a capture kept of one micro-batch.
        names: of the parameters.
        batch: B.

    Raises:
        CoverageError: a parameter's gradients answer inner products only.

    Example:
        >>> from assay.capture.marks import leaf
        >>> w = Parameter(torch.zeros(2))
        >>> used = [(leaf(w, 0), Dense(torch.tensor([[3.0, 4.0], [0.0, 1.0]])))] * 2
        >>> squared_norms(used, {w: "w"}, 2)[w]
        tensor([100.,   4.])
    """
    uses: dict[Parameter, list[tuple[Weight, Factors]]] = {}
    for weight, factors in kept:
        for param in weight.params:
            uses.setdefault(param, []).append((weight, _plain(factors)))
    return {param: _of_one(param, found, names[param], batch) for param, found in uses.items()}


def _of_one(param: Parameter, uses: list[tuple[Weight, Factors]], name: str, batch: int) -> Tensor:
    if len(uses) == 1 and len(uses[0][0].params) == 1 and not uses[0][0].derived:
        short = _without_writing_out(uses[0][1])
        if short is not None:
            return short
    if any(weight.pull is None for weight, _ in uses):
        raise CoverageError(
            f"parameter {name} is measured by a fallback that answers inner products only, so that its gradients have "
            f"no norm; pass exclude=[{name!r}], or leave GradientNorms out."
        )
    whole = Sides(tuple(param.shape))
    size = max(1, ENTRIES // max(param.numel(), 1))
    blocks = []
    for start in range(0, batch, size):
        stop = min(start + size, batch)
        parts = [projected(weight, _some(f, start, stop, batch), {param: whole})[param] for weight, f in uses]
        total = sum(part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
        assert isinstance(total, Tensor)
        blocks.append(total.flatten(1).square().sum(1))
    return torch.cat(blocks)


def _without_writing_out(factors: Factors) -> Tensor | None:
    """`[B]`: by the products of all pairs of positions, where that is less work."""
    if not isinstance(factors, Outer) or factors.layout.labels is not None:
        return None
    layout, (d, p) = factors.layout, (factors.a.shape[-1], factors.b.shape[-1])
    positions = factors.b.numel() // max(p * layout.batch, 1)
    if layout.dim >= factors.b.dim() - 1 or positions * (p + d) > p * d:
        return None
    a = layout.grouped(factors.a).reshape(layout.batch, -1, d)
    b = layout.grouped(factors.b).reshape(layout.batch, -1, p)
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    return ((a @ a.mT) * (b @ b.mT)).sum((1, 2))


def _plain(factors: Factors) -> Factors:
    """Without what is only about tokens or memory."""
    if isinstance(factors, ByToken):
        return _plain(factors.factors)
    if isinstance(factors, Rounded):
        return factors.widened()
    return factors.summed() if isinstance(factors, Elementwise) else factors


def _some(factors: Factors, start: int, stop: int, batch: int) -> Factors:
    """The factors of the samples from `start` to `stop`."""
    if (start, stop) == (0, batch):
        return factors
    if isinstance(factors, Dense):
        return Dense(factors.gradients[start:stop])
    if isinstance(factors, Outer):
        a, layout = _rows(factors.a, factors.layout, start, stop)
        return replace(factors, a=a, b=_rows(factors.b, factors.layout, start, stop)[0], layout=layout)
    if isinstance(factors, Lookup):
        indices, layout = _rows(factors.indices, factors.layout, start, stop)
        return Lookup(indices, _rows(factors.b, factors.layout, start, stop)[0], layout)
    assert isinstance(factors, Directional)
    labels = factors.layout.row_labels(factors.b.shape[factors.layout.dim], factors.b.device)
    inside = (labels >= start) & (labels < stop)
    layout = Layout(factors.layout.dim, stop - start, 1, torch.where(inside, labels - start, -1))
    return Directional(factors.call, factors.primals, factors.operand, factors.b, layout)


def _rows(x: Tensor, layout: Layout, start: int, stop: int) -> tuple[Tensor, Layout]:
    """The rows of some samples, in dimension 0, and where they are."""
    if layout.labels is None:
        return layout.grouped(x)[start:stop], Layout(0, stop - start)
    inside = (layout.labels >= start) & (layout.labels < stop)
    return x.movedim(layout.dim, 0)[inside], Layout(0, stop - start, 1, layout.labels[inside] - start)
