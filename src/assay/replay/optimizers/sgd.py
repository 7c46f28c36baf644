"""Stochastic gradient descent, with momentum, Nesterov's too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from assay.replay.optimizers.base import WEIGHTS, OptimizerAdjoint, Vectors

__all__ = ["SGDAdjoint"]


class SGDAdjoint(OptimizerAdjoint):
    """`torch.optim.SGD`.

    The step: g' = ±g + wd·w, b_t = μ b_{t−1} + (1 − τ) g' (b_1 = g'), u = b_t, or g' + μ b_t with Nesterov, or g'
    without momentum, and w ← w − lr·u. Its adjoint, with λ behind the step on the right-hand side:

        λ_u  = −lr λ_w
        λ_b' = λ_b + λ_u            (Nesterov: λ_b + μ λ_u)
        λ_g' = (1 − τ) λ_b'         (Nesterov: + λ_u; at the first step without the factor 1 − τ)
        λ_b ← μ λ_b',   λ_w ← λ_w + wd λ_g',   λ_g = ±λ_g'
    """

    buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def pull(
        self, options: Mapping[str, Any], count: int, before: Vectors, g: Tensor, adjoints: Vectors
    ) -> Tensor:
        """One step backwards."""
        mu, first = options["momentum"], count == 1
        of_w, of_b = adjoints[WEIGHTS], adjoints["momentum_buffer"]
        of_u = -options["lr"] * of_w
        if mu:
            of_b.add_(of_u, alpha=mu if options["nesterov"] else 1)
            of_g = (1.0 if first else 1 - options["dampening"]) * of_b
            of_g = of_g.add_(of_u) if options["nesterov"] else of_g
            of_b.mul_(0.0 if first else mu)
        else:
            of_g = of_u
        if options["weight_decay"]:
            of_w.add_(of_g, alpha=options["weight_decay"])
        return of_g.neg_() if options["maximize"] else of_g
