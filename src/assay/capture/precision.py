"""Half precision in the checks: switched off where a pass allows it, allowed for where gradients were formed in it.

The gradient of a parameter and the sum of its per-sample gradients are rounded apart, each number by up to half of ε
of itself. So sums of n parts that were rounded to ε differ by about ε √(n (‖Σ_i g_i‖² + Σ_i ‖g_i‖²)): relative to the
parts, which where they cancel are far larger than what they add up to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from assay.capture.factors import Factors, Lookup

__all__ = ["FullPrecision", "Roundings"]


class FullPrecision(TorchFunctionMode):
    """No autocast inside, not even one that the model enters itself (Accelerate wraps `forward` in it).

    An autocast holds from the first call inside of it, and what was on before comes back where it ends.

    Args:
        device: its kind.

    Attributes:
        met: whether there was any.

    Example:
        >>> x = torch.ones(1, 1)
        >>> with FullPrecision("cpu"), torch.autocast("cpu", torch.bfloat16):
        ...     (x @ x).dtype
        torch.float32
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.met = device, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` without autocast."""
        if torch.is_autocast_enabled(self.device):
            self.met = True
            torch.set_autocast_enabled(self.device, False)
        return func(*args, **(kwargs or {}))


class Roundings:
    """How often, and how coarsely, the gradients of each parameter are rounded to half precision."""

    def __init__(self) -> None:
        self._uses: list[tuple[tuple[Parameter, ...], float | None, int]] = []

    def add(self, params: tuple[Parameter, ...], factors: Factors | None) -> None:
        """One use of a weight of these parameters, and what it left; None for a derivative through the whole model."""
        steps = [_half(x.dtype) for x in _tensors(factors)]
        step = max(steps, default=None)
        self._uses.append((params, step, _additions(factors) if step else 1))

    def coarsest(self) -> float:
        """ε² of the lowest precision of all, 0 where there is no half precision."""
        return max((step for _, step, _ in self._uses if step is not None), default=0.0) ** 2

    def found(self) -> dict[Parameter, float]:
        """`{parameter: ε² n}`, of those that have any."""
        lowest = self.coarsest() ** 0.5
        found: dict[Parameter, float] = {}
        for params, step, count in self._uses:
            if step is None:  # rounded at every use on the way
                step, count = lowest, len(self._uses)
            for param in params:
                rounded = max(step, _half(param.dtype))  # where `.grad` itself is in half precision
                if rounded:
                    found[param] = found.get(param, 0.0) + rounded**2 * count
        return found


def _tensors(factors: Factors | None) -> list[Tensor]:
    """What a use left that is rounded; nothing where the model's boundary was asked."""
    held: list[Any] = [getattr(factors, f.name) for f in fields(factors)] if is_dataclass(factors) else []
    return [x for x in held if isinstance(x, Tensor) and x.is_floating_point()]


def _half(dtype: torch.dtype) -> float:
    """ε of a precision below float32, 0 of others."""
    eps = torch.finfo(dtype).eps
    return eps if eps > torch.finfo(torch.float32).eps else 0.0


def _additions(factors: Factors | None) -> int:
    """How many parts are added one by one in the precision of the parts: the positions that look the same row up."""
    if not isinstance(factors, Lookup) or not factors.indices.numel():
        return 1
    return int(torch.unique(factors.indices, return_counts=True)[1].max())
