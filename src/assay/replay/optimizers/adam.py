"""Adam and AdamW, AMSGrad too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from assay.replay.optimizers.base import WEIGHTS, OptimizerAdjoint, Vectors

__all__ = ["AMSGradAdjoint", "AdamAdjoint", "AdamWAdjoint"]


class AdamAdjoint(OptimizerAdjoint):
    """`torch.optim.Adam`; `AdamW` where the group's decay is decoupled.

    The step: g' = ±g (+ wd·w, unless decoupled), m = β₁ m + (1 − β₁) g', v = β₂ v + (1 − β₂) g'², and
    w ← (1 − lr·wd) w − lr (m/c₁)/D with D = s + ε, s = √(v/c₂), cᵢ = 1 − βᵢᵗ. Its adjoint, with λ behind the step on
    the right-hand side:

        μ    = λ_m − λ_w lr / (c₁ D)
        ν    = λ_v + λ_w lr (m/c₁) / (2 c₂ s D²)
        λ_g' = (1 − β₁) μ + 2 (1 − β₂) g' ν
        λ_m ← β₁ μ,   λ_v ← β₂ ν,   λ_w ← (1 − lr·wd) λ_w   (coupled: λ_w + wd λ_g'),   λ_g = ±λ_g'

    Where s = 0 the entry never had a gradient, m is zero too, and ν keeps λ_v alone.
    """

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    reads: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    reads_gradient: ClassVar[bool] = True
    decoupled: ClassVar[bool] = False

    def pull(
        self, options: Mapping[str, Any], count: int, before: Vectors, g: Tensor, adjoints: Vectors
    ) -> Tensor:
        """One step backwards."""
        lr, (beta1, beta2), decay = options["lr"], options["betas"], options["weight_decay"]
        decoupled = options.get("decoupled_weight_decay", self.decoupled)
        of_w, mu, nu = adjoints[WEIGHTS], adjoints["exp_avg"], adjoints["exp_avg_sq"]
        g = -g if options["maximize"] else g
        if decay and not decoupled:
            g = g + decay * before[WEIGHTS]
        m = before["exp_avg"].lerp(g, 1 - beta1)
        v = (beta2 * before["exp_avg_sq"]).addcmul_(g, g, value=1 - beta2)
        c1, c2 = 1 - beta1**count, 1 - beta2**count
        s = (self._largest(before, v) / c2).sqrt_()
        D = s + options["eps"]
        mu.addcdiv_(of_w, D, value=-lr / c1)
        # lr (m/c1) / (2 c2 s D²), each factor of moderate size
        bend = m.div_(D).div_(D.mul_(s)).mul_(lr / (2 * c1 * c2)).masked_fill_(s == 0, 0.0)
        self._second(before, v, bend, adjoints)
        of_g: Tensor = ((1 - beta1) * mu).addcmul_(nu, g, value=2 * (1 - beta2))
        if decay and decoupled:
            of_w.mul_(1 - lr * decay)
        elif decay:
            of_w.add_(of_g, alpha=decay)
        mu.mul_(beta1)
        nu.mul_(beta2)
        return of_g.neg_() if options["maximize"] else of_g

    def _largest(self, before: Vectors, v: Tensor) -> Tensor:
        """The second moment that the denominator takes."""
        return v

    def _second(self, before: Vectors, v: Tensor, bend: Tensor, adjoints: Vectors) -> None:
        """ν in the place of λ_v, and the adjoints of further buffers."""
        adjoints["exp_avg_sq"].addcmul_(adjoints[WEIGHTS], bend)


class AdamWAdjoint(AdamAdjoint):
    """`torch.optim.AdamW`."""

    decoupled: ClassVar[bool] = True


class AMSGradAdjoint(AdamAdjoint):
    """The form with max_{s≤t} v_s in the denominator: its adjoint goes to whichever was the larger."""

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    reads: ClassVar[tuple[str, ...]] = buffers

    def _largest(self, before: Vectors, v: Tensor) -> Tensor:
        return torch.maximum(before["max_exp_avg_sq"], v)

    def _second(self, before: Vectors, v: Tensor, bend: Tensor, adjoints: Vectors) -> None:
        of_largest = adjoints["max_exp_avg_sq"].addcmul_(adjoints[WEIGHTS], bend)
        new = v >= before["max_exp_avg_sq"]
        adjoints["exp_avg_sq"].add_(of_largest * new)
        of_largest.masked_fill_(new, 0.0)


class AMSGradWAdjoint(AMSGradAdjoint):
    """AMSGrad of `torch.optim.AdamW`."""

    decoupled: ClassVar[bool] = True
