"""Per-sample gradients in half the memory, for a correction that is small itself."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from assay.capture.factors import Dense, Factors, Lookup, Outer

__all__ = ["Rounded", "rounded"]


@dataclass(frozen=True)
class Rounded:
    """Factors whose float32 tensors are held in bfloat16: half the memory, 8 binary digits."""

    factors: Factors

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩ of the rounded gradients, summed in float32."""
        return self.widened().dot(directions)

    def widened(self) -> Factors:
        """The factors in float32."""
        return _converted(self.factors, torch.bfloat16, torch.float32)


def rounded(factors: Factors) -> Factors:
    """The same in half the memory where they are tensors in float32; as they are where they are not.

    Example:
        >>> kept = rounded(Dense(torch.tensor([[1.0, 1 / 3]])))
        >>> kept.dot(torch.tensor([[0.0, 3.0]]))
        tensor([[1.0020]])
    """
    if not isinstance(factors, (Dense, Outer, Lookup)):
        return factors
    low = _converted(factors, torch.float32, torch.bfloat16)
    return factors if low is factors else Rounded(low)


def _converted(factors: Factors, old: torch.dtype, new: torch.dtype) -> Factors:
    held = {f.name: getattr(factors, f.name) for f in fields(factors)}  # type: ignore[arg-type]
    changed = {k: v.to(new) for k, v in held.items() if isinstance(v, Tensor) and v.dtype == old}
    return replace(factors, **changed) if changed else factors  # type: ignore[type-var]
