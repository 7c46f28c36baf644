"""Which positions of an example an influence comes from.

The gradient of an example is a sum over its positions: of a linear layer Σ_t b_t ⊗ a_t, of an embedding the rows that
position t looked up. The share of position t is what flows through the weights' use at t, and the shares add up to the
influence. Biases and norms are summed over positions before anybody sees them: their part is returned apart.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from assay.capture.bottleneck import projected, stream_factors
from assay.capture.factors import Factors, Lookup, Outer
from assay.capture.layout import Layout
from assay.capture.marks import Weight
from assay.projection import LossFn, Projector, Reduction

__all__ = ["Shares", "token_scores"]


class Shares:
    """Adds up the scores of positions, use by use.

    Args:
        projector: of the index.
        directions: `[Q, width]`.
        batch: B.

    Attributes:
        tokens: `[Q, B, T]`, T the positions of the first use that has several; None before any.
        rest: `[Q, B]`, what has no position of its own: biases, norms, uses with another number of positions.
    """

    def __init__(self, projector: Projector, directions: Tensor, batch: int) -> None:
        self._projector, self._directions, self._batch = projector, directions, batch
        self.tokens: Tensor | None = None
        self.rest = directions.new_zeros(len(directions), batch)

    def add(self, weight: Weight, factors: Factors) -> None:
        """Add one use."""
        found = _by_position(factors)
        positions = 0 if found is None else found.layout.batch // self._batch
        if self.tokens is None and positions > 1:
            self.tokens = self.rest.new_zeros(*self.rest.shape, positions)
        apart = found is not None and self.tokens is not None and positions == self.tokens.shape[2]
        chosen = found if apart and found is not None else factors
        for param, part in projected(weight, chosen, self._projector.sides).items():
            columns = self._projector.slices[param]
            scores = self._directions[:, columns] @ part.flatten(1).to(self._directions).t()
            if apart and self.tokens is not None:
                self.tokens += scores.view_as(self.tokens)
            else:
                self.rest += scores


def token_scores(
    projector: Projector,
    model: Module,
    loss_fn: LossFn,
    batch: object,
    size: int,
    reduction: Reduction,
    directions: Tensor,
) -> tuple[Tensor, Tensor]:
    """`[Q, B, T]` shares of the positions of each row of a batch, and `[Q, B]` the rest."""
    shares = Shares(projector, directions, size)
    stream_factors(model, projector.weights, loss_fn, batch, size, shares.add)
    scale = size if reduction == "mean" else 1
    tokens = shares.rest.new_zeros(*shares.rest.shape, 0) if shares.tokens is None else shares.tokens
    return tokens * scale, shares.rest * scale


def _by_position(factors: Factors) -> Outer | Lookup | None:
    """The same use with every position as a sample of its own; None where positions are already summed."""
    if not isinstance(factors, (Outer, Lookup)) or factors.layout.labels is not None:
        return None
    layout, b = factors.layout, factors.b
    b = layout.grouped(b).reshape(-1, b.shape[-1])  # [B·T, p], sample by sample
    alone = Layout(0, len(b))
    if isinstance(factors, Outer):
        a = layout.grouped(factors.a).reshape(-1, factors.a.shape[-1])
        return Outer(a, b, alone, factors.transposed)
    return Lookup(layout.grouped(factors.indices).reshape(-1), b, alone)
