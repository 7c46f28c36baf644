"""Adam and its relatives: an average of gradients over the root of an average of their squares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import AdamW

from assay.optimizers.inputs import Group, State
from assay.optimizers.model import OptimizerModel
from assay.optimizers.scalars import Multiple, Scalar, next_step, number, second_moment, widened

__all__ = ["Adam"]


class Adam(OptimizerModel):
    """``torch.optim.Adam``, ``AdamW`` and their AMSGrad forms.

    m_t = β₁ m_{t−1} + (1 − β₁) g_t, v_t = β₂ v_{t−1} + (1 − β₂) g_t², and
    u = m_t/(1 − β₁ᵗ) · P_t with P_t = 1/(√(v_t/(1 − β₂ᵗ)) + ε); AMSGrad takes max_{s≤t} v_s in place of v_t.
    A relative overrides :meth:`_weights` (how u reads g_t and m_{t−1}) or :meth:`_preconditioner`.

    Source: Kingma and Ba, ICLR 2015, algorithm 1; Loshchilov and Hutter, ICLR 2019, algorithm 2; Reddi,
    Kale and Kumar, ICLR 2018, algorithm 2.
    """

    def _linear(
        self, group: Group, state: State, w: Tensor, g: Tensor
    ) -> tuple[Tensor | float, Tensor | Multiple | float]:
        t, m = next_step(state), state.get("exp_avg")
        v = second_moment(state.get("exp_avg_sq"), g, number(group["betas"][1]))
        if m is not None and _is_amsgrad(group):
            v = torch.maximum(widened(state["max_exp_avg_sq"]), v)
        precondition = self._preconditioner(group, t, v)
        instant, carry = self._weights(group, t, self._mu_product(group, t, state))
        carried = 0.0 if m is None else Multiple(carry / instant, widened(m), gained=True)
        return precondition.mul_(instant), carried

    def _foreseen_gain(self, group: Group, state: State) -> Tensor | None:
        v = state.get("max_exp_avg_sq" if _is_amsgrad(group) else "exp_avg_sq")
        t = next_step(state)
        if v is None or (not isinstance(t, Tensor) and t == 1):
            return None
        beta2 = number(group["betas"][1])
        before, now = 1 - beta2 ** (t - 1), 1 - beta2**t
        instant, _ = self._weights(group, t, self._mu_product(group, t, state))
        if isinstance(t, Tensor):
            # State without a step: a fused optimizer whose first steps GradScaler skipped. Reading t would
            # wait for the device, so a gain that nothing is known of becomes 0.
            before, instant = torch.where(t > 1, before, 1.0), torch.where(t > 1, instant, 0.0)
        return instant * self._preconditioner(group, t, widened(v) * (now / before))

    def _preconditioner(self, group: Group, t: Scalar, v: Tensor) -> Tensor:
        """Return P_t, the diagonal by which the averaged gradient is multiplied; may overwrite ``v``."""
        bias2 = 1 - number(group["betas"][1]) ** t
        return v.div_(bias2).sqrt_().add_(group["eps"]).reciprocal_()

    def _weights(self, group: Group, t: Scalar, mu_product: Scalar) -> tuple[Scalar, Scalar]:
        """Return the weights of g_t and of m_{t−1} in u / P_t."""
        beta1 = number(group["betas"][0])
        bias1 = 1 - beta1**t
        return (1 - beta1) / bias1, beta1 / bias1

    def _mu_product(self, group: Group, t: Scalar, state: State | None) -> Scalar:
        """Return ∏_{i≤t} μ_i, from the state or (``None``) from the start; only NAdam has it."""
        return 0.0

    def _momentum(self, group: Group) -> Scalar:
        return number(group["betas"][0])

    def _kappa(self, group: Group, t: int, s: int) -> Scalar:
        instant, carry = self._weights(group, t, self._mu_product(group, t, None))
        if s == t:
            return instant
        beta1 = number(group["betas"][0])
        return carry * (1 - beta1) * beta1 ** (t - 1 - s)  # m_{t−1} = Σ_s (1 − β₁) β₁^{t−1−s} g_s

    def _weight_decay(self, group: Group) -> tuple[Scalar, bool]:
        decoupled = group.get("decoupled_weight_decay", isinstance(self.optimizer, AdamW))
        return number(group["weight_decay"]), bool(decoupled)


def _is_amsgrad(group: Group) -> bool:
    return bool(group.get("amsgrad", False))
