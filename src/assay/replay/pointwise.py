"""Activations y = f(x) whose second derivative is formed once for all queries.

torch forms f'(x) and f''(x) anew in every pass through a graph, in a dozen passes over memory for the second. Here both
are kept from the first time they are needed, so that each further product with them is one multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KNOWN", "pointwise"]

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]


def pointwise(func: Callable[..., Any], x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """`func(x)`, differentiable twice; None where it is a form that is not known here."""
    if any(kwargs.values()) and kwargs != {"approximate": "none"}:
        return None
    if x.dtype not in (torch.float32, torch.float64):
        return None
    return _Value.apply(x, func, KNOWN[func])  # type: ignore[no-any-return,no-untyped-call]


class _Curves:
    """f' and f'' at x, formed when they are first asked for."""

    def __init__(self, x: Tensor, derivatives: Derivatives) -> None:
        self._x, self._derivatives = x, derivatives
        self._found: tuple[Tensor, Tensor] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        if self._found is None:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._found = self._derivatives(self._x)
        return self._found


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, func: Callable[..., Tensor], derivatives: Derivatives) -> Tensor:
        ctx.save_for_backward(x)
        ctx.curves = _Curves(x.detach(), derivatives)
        return func(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _Slope.apply(gy, x, ctx.curves), None, None  # type: ignore[no-untyped-call]


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, curves: _Curves) -> Tensor:
        ctx.save_for_backward(gy)
        ctx.curves, ctx.bent = curves, None
        return gy * curves()[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.curves()
        if ctx.bent is None:
            ctx.bent = ctx.saved_tensors[0] * second
        return along * first, along * ctx.bent, None


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of GELU: f' = Φ + xφ,  f'' = u φ with u = 2 − x² and φ = exp(u/2 − 1)/√2π."""
    u = torch.addcmul(x.new_full((), 2.0), x, x, value=-1)
    density = torch.add(x.new_full((), -1 - math.log(2 * math.pi) / 2), u, alpha=0.5).exp_()
    return torch.ops.aten.gelu_backward(x.new_ones(()).expand_as(x), x), density.mul_(u)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of SiLU, σ the sigmoid: f' = σ (1 + x(1 − σ)),  f'' = σ(1 − σ) (2 + x(1 − 2σ))."""
    s = x.sigmoid()
    rest = 1 - s
    return (x * rest).add_(1).mul_(s), (s * -2).add_(1).mul_(x).add_(2).mul_(s).mul_(rest)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of tanh: f' = 1 − y²,  f'' = −2 y f'."""
    y = x.tanh()
    first = (y * y).neg_().add_(1)
    return first, (y * first).mul_(-2)


KNOWN: dict[Callable[..., Any], Derivatives] = {
    F.gelu: _gelu,
    F.silu: _silu,
    F.tanh: _tanh,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
}
