"""Adam with a rectified variance."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.optimizers.adam import Adam
from assay.optimizers.inputs import Group
from assay.optimizers.scalars import Scalar, number

__all__ = ["RAdam"]


class RAdam(Adam):
    """``torch.optim.RAdam``: u = m_t/(1 − β₁ᵗ) · P_t with P_t = r_t √(1 − β₂ᵗ)/(√v_t + ε).

    ρ_∞ = 2/(1 − β₂) − 1, ρ_t = ρ_∞ − 2tβ₂ᵗ/(1 − β₂ᵗ),
    r_t = √((ρ_t − 4)(ρ_t − 2)ρ_∞ / ((ρ_∞ − 4)(ρ_∞ − 2)ρ_t)); P_t = 1 as long as ρ_t ≤ 5.
    Source: Liu et al., ICLR 2020, algorithm 2; the bound 5 is that of the torch implementation.
    """

    def _preconditioner(self, group: Group, t: Scalar, v: Tensor) -> Tensor:
        beta2 = number(group["betas"][1])
        bias2 = 1 - beta2**t
        rho_inf: Scalar = 2 / (1 - beta2) - 1
        rho: Scalar = rho_inf - 2 * t * beta2**t / bias2
        rectified: Scalar
        plain: Scalar
        if isinstance(rho, Tensor):  # both branches, as scalars: P_t = rectified/(√v + ε) + plain
            rectified = torch.where(rho > 5, _rectification(rho, rho_inf) * bias2**0.5, 0.0)
            plain = torch.where(rho > 5, 0.0, 1.0)
        elif rho > 5:
            rectified, plain = _rectification(rho, rho_inf) * bias2**0.5, 0.0
        else:
            return torch.ones_like(v)
        return v.sqrt_().add_(group["eps"]).reciprocal_().mul_(rectified).add_(plain)


def _rectification(rho: Scalar, rho_inf: Scalar) -> Scalar:
    ratio: Scalar = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    root: Scalar = ratio**0.5
    return root
