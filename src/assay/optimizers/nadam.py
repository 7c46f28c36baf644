"""Adam with Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.optimizers.adam import Adam
from assay.optimizers.inputs import Group, State
from assay.optimizers.scalars import Scalar, number

__all__ = ["NAdam"]


class NAdam(Adam):
    """``torch.optim.NAdam``: u = [(1 − μ_t) g_t/(1 − Π_t) + μ_{t+1} m_t/(1 − Π_{t+1})] · P_t.

    μ_t = β₁(1 − ½·0.96^{tψ}) with ψ the momentum decay, Π_t = ∏_{i≤t} μ_i, and m_t, P_t as in Adam.
    Source: Dozat, ICLR workshop 2016, algorithm 2, in the form of the torch documentation.
    """

    def _weights(self, group: Group, t: Scalar, mu_product: Scalar) -> tuple[Scalar, Scalar]:
        beta1, mu, mu_next = number(group["betas"][0]), _mu(group, t), _mu(group, t + 1)
        ahead = mu_next / (1 - mu_product * mu_next)
        return (1 - mu) / (1 - mu_product) + ahead * (1 - beta1), ahead * beta1

    def _mu_product(self, group: Group, t: Scalar, state: State | None) -> Scalar:
        if state is None:
            product, i = 1.0, 1
            while i <= t and product > 1e-20:  # below, 1 − Π is 1 in float64
                product, i = product * float(_mu(group, i)), i + 1
            return product
        before, mu = state.get("mu_product"), _mu(group, t)
        if before is None:  # torch keeps it in float32 unless the default dtype is float64
            dtype = torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
            before = torch.ones((), dtype=dtype, device="cpu")
        return number(
            before * (mu.to(before) if isinstance(mu, Tensor) else mu)
        )  # rounded as torch rounds it


def _mu(group: Group, t: Scalar) -> Scalar:
    psi = number(group["momentum_decay"])
    ramp: Scalar = 0.96 ** (t * psi)
    return number(group["betas"][0]) * (1 - 0.5 * ramp)
