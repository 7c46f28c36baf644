"""The curvature of the targets along one direction: the second order of In-Run Data Shapley.

With u = w_t − w_{t+1} the quadratic Taylor expansion of the target's loss has the drop ∇ℓᵀu − ½ uᵀHu. Take as
players the samples (K g_i), the momentum carried over and the weight decay, whose moves add up to u. A quadratic
form gives each of two players half of their interaction, so the Shapley value of a player with the move x is

    xᵀ(∇ℓ − ½ H u)

which for a sample is v_i = ∇ℓᵀ K g_i − ½ (K g_i)ᵀ H K Σ_j g_j where nothing is carried or decayed (Wang et al., arXiv
2406.11011, theorem on the second order). One Hessian-vector product serves all players, and they add up exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.errors import AssayWarning
from assay.methods.line import placed
from assay.targets import TargetPass

__all__ = ["HessianProducts"]


class HessianProducts:
    """H_n u for every target n at the present weights, by differentiating twice.

    Attention runs on its plain kernel for this pass only, since the fused ones have no second derivative. Where some
    other operation has none, gradients at two near-by points are differenced instead, and a warning says so.

    Args:
        passes: the targets.
    """

    def __init__(self, passes: TargetPass) -> None:
        self.passes = passes
        self._differenced = False

    def __call__(self, direction: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """`{parameter: [targets, *shape]}` for u of `{parameter: shape}`."""
        if not self._differenced:
            try:
                return self.passes.hessian_products(direction)
            except (NotImplementedError, RuntimeError) as error:
                if not _has_no_second_derivative(error):
                    raise
                self._differenced = True
                warnings.warn(
                    f"path='hessian': the target cannot be differentiated twice ({str(error).splitlines()[0]}), so its "
                    "curvature is taken from central differences of gradients, exact to about the square root of "
                    "the number format; rewrite the operation, or take path='trapezoid', which needs no Hessian.",
                    AssayWarning,
                    stacklevel=2,
                )
        return self._difference(direction)

    def _difference(self, direction: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """(∇ℓ(w + hu) − ∇ℓ(w − hu)) / 2h, h balancing rounding against the third derivative."""
        length = _norm(direction)
        if length == 0:
            return {p: g.zero_() for p, g in self.passes.gradients()[1].items()}
        weights = {p: p.detach().clone() for p in direction}
        narrow = next(iter(weights.values())).dtype
        h = torch.finfo(narrow).eps ** (1 / 3) * max(_norm(weights), 1.0) / length
        ends = []
        for sign in (1, -1):
            with placed({p: w + sign * h * direction[p] for p, w in weights.items()}):
                ends.append(self.passes.gradients()[1])
        return {p: (right - ends[1][p]) / (2 * h) for p, right in ends[0].items()}


def _norm(tensors: Mapping[Parameter, Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt())


def _has_no_second_derivative(error: Exception) -> bool:
    text = str(error)
    return "not implemented" in text or "once_differentiable" in text or "double backward" in text.lower()
