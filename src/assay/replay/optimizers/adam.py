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
        self, options: Mapping[str, Any], count: int, before: Vectors, g: Tensor, after: Vectors
    ) -> tuple[Vectors, Tensor]:
        """One step backwards."""
        lr, (beta1, beta2), decay = options["lr"], options["betas"], options["weight_decay"]
        decoupled = options.get("decoupled_weight_decay", self.decoupled)
        of_w = after[WEIGHTS]
        g = -g if options["maximize"] else g
        if decay and not decoupled:
            g = g + decay * before[WEIGHTS]
        m = before["exp_avg"].lerp(g, 1 - beta1)
        v = (beta2 * before["exp_avg_sq"]).addcmul_(g, g, value=1 - beta2)
        c1, c2 = 1 - beta1**count, 1 - beta2**count
        s = (self._largest(before, v) / c2).sqrt_()
        D = s + options["eps"]
        mu = torch.addcdiv(after["exp_avg"], of_w, D, value=-lr / c1)
        # lr (m/c1) / (2 c2 s D²), each factor of moderate size
        bend = m.div_(D).div_(D.mul_(s)).mul_(lr / (2 * c1 * c2)).masked_fill_(s == 0, 0.0)
        result, nu = self._second(before, v, of_w * bend, after)
        of_g = ((1 - beta1) * mu).addcmul_(nu, g, value=2 * (1 - beta2))
        if decay:
            of_w = (1 - lr * decay) * of_w if decoupled else of_w + decay * of_g
        result |= {WEIGHTS: of_w, "exp_avg": mu.mul_(beta1), "exp_avg_sq": nu.mul_(beta2)}
        return result, of_g.neg_() if options["maximize"] else of_g

    def _largest(self, before: Vectors, v: Tensor) -> Tensor:
        """The second moment that the denominator takes."""
        return v

    def _second(self, before: Vectors, v: Tensor, bent: Tensor, after: Vectors) -> tuple[Vectors, Tensor]:
        """ν, and the adjoints of further buffers."""
        return {}, after["exp_avg_sq"] + bent


class AdamWAdjoint(AdamAdjoint):
    """`torch.optim.AdamW`."""

    decoupled: ClassVar[bool] = True


class AMSGradAdjoint(AdamAdjoint):
    """The form with max_{s≤t} v_s in the denominator: its adjoint goes to whichever was the larger."""

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    reads: ClassVar[tuple[str, ...]] = buffers

    def _largest(self, before: Vectors, v: Tensor) -> Tensor:
        return torch.maximum(before["max_exp_avg_sq"], v)

    def _second(self, before: Vectors, v: Tensor, bent: Tensor, after: Vectors) -> tuple[Vectors, Tensor]:
        of_largest = after["max_exp_avg_sq"] + bent
        new = v >= before["max_exp_avg_sq"]
        return {"max_exp_avg_sq": of_largest * ~new}, after["exp_avg_sq"] + of_largest * new


class AMSGradWAdjoint(AMSGradAdjoint):
    """AMSGrad of `torch.optim.AdamW`."""

    decoupled: ClassVar[bool] = True
