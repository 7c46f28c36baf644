"""Per-sample gradients taken apart by token: the part of g_i that flows through a weight's use at one position.

Give every (sample, position) a copy W_it of a weight for each of its uses, so that row (i, t) of the use's output is
computed with W_it. Its gradient g_it is the part of g_i that flows through the use at that position, Σ_t g_it = g_i,
and for the output y with the gradient b

    ⟨g_it, G⟩ = Σ_{entries of y at (i, t)} b · (∂y/∂W·G)

The positions are those of dimension 1 of the model's inputs `[B, T]` or `[B, T, d]`; `track.tokens` follows them to
the output of each use. A use whose output has no such dimension (a head on the mean of the sequence) is not taken
apart: its part is the sample's, in one more column behind the positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.factors import Directional, Elementwise, Factors, Lookup, Outer
from assay.capture.held import number_of
from assay.capture.layout import Layout, refuse_rows_of_nobody
from assay.capture.marks import Directions, Weight, directional_derivative

__all__ = ["ByToken", "contract_by_token", "positions_in"]


@dataclass(frozen=True)
class ByToken:
    """Factors with the places of the positions in the output of their use; None where it has none."""

    factors: Factors
    tokens: Layout | None

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩."""
        return self.factors.dot(directions)

    def dot_by_token(self, directions: Tensor, positions: int) -> Tensor:
        """`[targets, B, positions + 1]`: ⟨g_it, G_n⟩, what has no position last."""
        layout: Layout | None = getattr(self.factors, "layout", None)
        if self.tokens is not None and layout is not None:
            products = _products(self.factors, directions)
            if products is not None:
                return torch.stack([_grouped(x, layout, self.tokens, positions) for x in products])
        whole = self.factors.dot(directions)
        return F.pad(whole[..., None], (positions, 0))


def contract_by_token(
    kept: list[tuple[Weight, Factors]], directions: Directions, like: Tensor, positions: int
) -> Tensor:
    """`[groups, targets, B, positions + 1]`: `factors.contract` taken apart by token.

    Args:
        kept: what a capture with `by_token` kept of one micro-batch.
        directions: `{parameter: [targets, *shape]}`.
        like: the micro-batch's own scores, `[groups, any, B]`.
        positions: the capture's `positions`.
    """
    targets = number_of(directions)
    scores = like.new_zeros(like.shape[0], targets, like.shape[2], positions + 1)
    for weight, factors in kept:
        placed = factors if isinstance(factors, ByToken) else ByToken(factors, None)
        for group, pushed in weight.push(directions).items():
            scores[group] += placed.dot_by_token(pushed, positions)
    return scores


def positions_in(tensor: Tensor) -> int:
    """T of a model's input: integers `[B, T]` or numbers `[B, T, d]`; 0 for any other."""
    return tensor.shape[1] if tensor.dim() == (3 if tensor.is_floating_point() else 2) else 0


def _products(factors: Factors, directions: Tensor) -> list[Tensor] | None:
    """For every direction b · (∂y/∂W·G_n), of the output's shape."""
    if isinstance(factors, Outer):
        moved = [factors.a @ (G if factors.transposed else G.mT).to(factors.a.dtype) for G in directions]
        return [_wide(y) * factors.b for y in moved]
    if isinstance(factors, Lookup):
        return [_wide(F.embedding(factors.indices, G)) * factors.b for G in directions]
    if isinstance(factors, Directional):
        call, primals = factors.call, factors.primals
        moved = [directional_derivative(call, primals, {factors.operand: G}) for G in directions]
        return [_wide(y) * factors.b for y in moved]
    if isinstance(factors, Elementwise):
        return [_wide(G.reshape(factors.shape)) * factors.parts for G in directions]
    return None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, layout: Layout, tokens: Layout, positions: int) -> Tensor:
    """`[B, positions + 1]`: the entries of x summed by sample and position."""
    batch, width = layout.batch, positions + 1
    owners = layout.row_labels(x.shape[layout.dim], x.device) % (
        batch + 1
    )  # rows of nobody, label −1, come last
    places = tokens.row_labels(x.shape[tokens.dim], x.device) % width
    if layout.dim == tokens.dim:
        x = x.movedim(layout.dim, 0).reshape(len(owners), -1).sum(1)
        index = owners * width + places
    else:
        x = x.movedim((layout.dim, tokens.dim), (0, 1)).reshape(len(owners), len(places), -1).sum(2)
        index = owners[:, None] * width + places
    out = x.new_zeros((batch + 1) * width).index_add_(0, index.reshape(-1), x.reshape(-1)).view(-1, width)
    if layout.labels is not None:  # rows in a regular order all belong to somebody
        refuse_rows_of_nobody(out[batch])
    return out[:batch]
