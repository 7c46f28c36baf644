"""Clipping of the gradient's norm, and its adjoint.

`torch.nn.utils.clip_grad_norm_` multiplies the gradient g of norm n by c = M/(n + 1e-6) where that is below 1. The
factor depends on g itself, so that with ĝ = c g

    λ_g = c λ_ĝ − (M/(n + 1e-6)²) (gᵀλ_ĝ)/n · g        where it clips, λ_ĝ where it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import InputError
from assay.replay.trajectory import StepRecord

__all__ = ["Clipping", "recorded_clipping"]

EPSILON = 1e-6


@dataclass(frozen=True)
class Clipping:
    """What the loop did to the gradient between `backward()` and `optimizer.step()`.

    Args:
        largest: norm that is allowed; None clips nothing.
        factor: a constant that multiplies every gradient before that.

    Example:
        >>> g = torch.tensor([3.0, 4.0])
        >>> Clipping(1.0).scale(5.0) * g
        tensor([0.6000, 0.8000])
        >>> Clipping(1.0).pull(g, 5.0, torch.tensor([[4.0, -3.0], [3.0, 4.0]]))[0]
        tensor([ 0.8000, -0.6000])
    """

    largest: float | None = None
    factor: float = 1.0

    def scale(self, norm: float) -> float:
        """By which a gradient of that norm is multiplied before the optimizer receives it."""
        if self.largest is None:
            return self.factor
        return self.factor * min(self.largest / (abs(self.factor) * norm + EPSILON), 1.0)

    def pull(self, g: Tensor, norm: float, of_received: Tensor) -> Tensor:
        """The adjoint of the gradient from that of what the optimizer received, in its place.

        Args:
            g: `[n]`, the gradient before clipping; nothing reads it where nothing is clipped.
            norm: of it.
            of_received: `[queries, n]`.
        """
        scale = self.scale(norm)
        if scale == self.factor or not norm:  # not clipped
            return of_received.mul_(scale) if scale != 1 else of_received
        n = abs(self.factor) * norm  # of g' = factor · g, which is what is clipped, by c = scale / factor
        turned = of_received @ g  # [queries]
        return of_received.addr_(turned, g, beta=scale, alpha=-scale * self.factor**2 / ((n + EPSILON) * n))


def recorded_clipping(records: Iterable[StepRecord], tolerance: float) -> Clipping:
    """What the loop did, from the scale that the run measured at every step.

    Where the scale was below 1 and the gradients came out with one and the same norm, that is the clipping norm; where
    the scale was the same at every step, that is the factor.

    Raises:
        InputError: neither; the caller must say `clip=`.
    """
    taken = [record for record in records if record.scales]
    for record in taken:
        apart = max(record.scales) - min(record.scales)
        if record.gap > tolerance or apart > tolerance * max(record.scales):
            raise InputError(
                f"step {record.step}: the gradient was changed by more than one factor between backward() and "
                "optimizer.step() (clip_grad_value_, clipping group by group, added noise?): that cannot be replayed."
            )
    scales = torch.tensor([record.scales[0] for record in taken], dtype=torch.float64)
    norms = torch.tensor([record.norm for record in taken], dtype=torch.float64)
    if not len(scales) or bool(((scales - 1).abs() <= tolerance).all()):
        return Clipping()
    if bool(((scales - scales[0]).abs() <= tolerance * scales[0]).all()) and len(scales) > 1:
        return Clipping(factor=_rounded(float(scales.median())))
    allowed = (norms + EPSILON * scales)[
        scales < 1 - tolerance
    ]  # c (n + ε), of a gradient whose norm n was c n after
    largest = float(allowed.median())
    if bool(((allowed - largest).abs() <= 10 * tolerance * largest).all()) and bool(
        (scales <= 1 + tolerance).all()
    ):
        return Clipping(_rounded(largest))
    raise InputError(
        "what the loop did to the gradient between backward() and optimizer.step() is neither clipping to one norm nor "
        "one factor; name the norm as adjoint(clip=...), or None, if it was one of the two all the same."
    )


def _rounded(x: float) -> float:
    """The number that the user is likely to have written."""
    near = float(f"{x:.3g}")
    return near if abs(near - x) <= 1e-6 * x else x
