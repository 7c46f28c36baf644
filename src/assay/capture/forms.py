"""Factored per-sample gradients taken further: multiplied with a matrix on one side, joined, written out."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.capture.factors import Apart, Dense, Directional, Factors, Outer, Patches
from assay.capture.layout import Layout

__all__ = ["applied", "dense", "joined", "scattered"]

ENTRIES = 1 << 22  # of a block of intermediate results, where the samples' rows lie in no regular order


def applied(x: Tensor, matrix: Tensor | None) -> Tensor:
    """`[…, r]`: x `[…, n]` through a projection `[r, n]`, summed later in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x if matrix is None else x @ matrix.to(x.dtype).t()).to(wide)


def joined(left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    """`[B, r0, r1]`: Σ_t left_it ⊗ right_it."""
    r0, r1 = left.shape[-1], right.shape[-1]
    if layout.labels is None:
        left, right = layout.grouped(left), layout.grouped(right)
        return left.reshape(layout.batch, -1, r0).mT @ right.reshape(layout.batch, -1, r1)
    left, right = left.movedim(layout.dim, 0), right.movedim(layout.dim, 0)
    middle = left.shape[1:-1].numel()  # named, since an expert may have no rows at all
    left, right = left.reshape(len(left), middle, r0), right.reshape(len(right), middle, r1)
    total = left.new_zeros(layout.batch, r0, r1)
    block = max(1, ENTRIES // (r0 * r1))
    for start in range(0, len(left), block):
        part = slice(start, start + block)
        pairs = left[part].mT @ right[part]  # [rows, r0, r1]
        total += layout.labelled(0, layout.labels[part]).per_sample_sum(pairs, keep=2)
    return total


def scattered(indices: Tensor, right: Tensor, layout: Layout, rows: int) -> Tensor:
    """`[B, rows, r1]`: right `[…, r1]` added up in the rows that it was looked up from."""
    owners = layout.row_labels(indices.shape[layout.dim], indices.device)
    shape = [1] * indices.dim()
    shape[layout.dim] = -1
    owners = owners.reshape(shape).expand_as(indices).reshape(-1)
    total = right.new_zeros((layout.batch + 1) * rows, right.shape[-1])
    places = (owners % (layout.batch + 1)) * rows + indices.reshape(-1)
    total.index_add_(0, places, right.reshape(-1, right.shape[-1]))
    return total.reshape(layout.batch + 1, rows, -1)[: layout.batch]


def dense(factors: Factors) -> Tensor | None:
    """`[B, *weight.shape]`: the gradients written out; None for factors that answer inner products only."""
    if isinstance(factors, Dense):
        return factors.gradients
    if isinstance(factors, Outer):
        left, right = (factors.a, factors.b) if factors.transposed else (factors.b, factors.a)
        return joined(applied(left, None), applied(right, None), factors.layout)
    if isinstance(factors, Patches):
        g = factors.projected(None, None)  # [B, p, patch]
        return g.reshape(len(g), *factors.primals[factors.operand].shape)
    if isinstance(factors, Apart):
        return factors.written_out()
    if isinstance(factors, Directional):
        return _differentiated(factors)
    return None


def _differentiated(factors: Directional) -> Tensor:
    """`[B, *weight.shape]`: one derivative of the operation per sample."""
    layout, b = factors.layout, factors.b
    owners = layout.row_labels(b.shape[layout.dim], b.device)
    shape = [1] * b.dim()
    shape[layout.dim] = -1
    rows = []
    with torch.enable_grad():
        primals = [x.detach() for x in factors.primals]
        moved = primals[factors.operand].requires_grad_()
        y = factors.call(*primals)
        for i in range(layout.batch):
            own = b * (owners == i).reshape(shape)
            rows.append(torch.autograd.grad(y, moved, own.to(y.dtype), retain_graph=True)[0])
    return torch.stack(rows)
