"""Hyper-parameters and step counts as numbers, without waiting for a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Multiple", "Scalar", "next_step", "number", "second_moment", "squeezed", "widened"]

Scalar = float | Tensor


@dataclass(frozen=True)
class Multiple:
    """`factor · tensor`, or `factor · gain ⊙ tensor` with the gain of the step that it is part of, not written out."""

    factor: Scalar
    tensor: Tensor
    gained: bool = False

    def written(self, gain: Tensor | float) -> Tensor:
        """Write it out."""
        return self.factor * (self.tensor * gain if self.gained else self.tensor)

    def times(self, factor: Scalar) -> Multiple:
        """Return the multiple of it."""
        return replace(self, factor=self.factor * factor)


def squeezed(x: Any) -> Scalar:
    """Return a number as it is and a one-element tensor without its dimensions."""
    return x.reshape(()) if isinstance(x, Tensor) else float(x)


def number(x: Any) -> Scalar:
    """Return a float, or a tensor without dimensions where reading it would wait for a device.

    ``torch.optim`` keeps step counts in host memory unless the optimizer is fused or capturable; as Python
    floats they give the very digits of the optimizer's own arithmetic and launch no kernel.
    """
    if not isinstance(x, Tensor):
        return float(x)
    if x.device.type == "cpu":
        return float(x)
    return x.reshape(()).to(torch.float64 if x.device.type == "cuda" else torch.float32)


def next_step(state: dict[str, Any]) -> Scalar:
    """Return t, the number of the step about to be taken, from the state before it."""
    return number(state.get("step", 0.0)) + 1


def widened(x: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def second_moment(v: Tensor | None, g: Tensor, beta: Scalar) -> Tensor:
    """Return β v + (1 − β) g², v = 0 if there is none yet."""
    if v is None:
        return g.square().mul_(1 - beta)
    if isinstance(beta, Tensor):  # `value=` takes no tensor without reading it
        return widened(v).mul(beta).add_(g.square().mul_(1 - beta))
    return widened(v).mul(beta).addcmul_(g, g, value=1 - beta)
