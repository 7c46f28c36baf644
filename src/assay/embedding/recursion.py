"""Algorithm 1 on one block of coordinates: one step back in time (see `assay.methods.embedding` for the symbols)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.methods.embedding import Curvature

__all__ = ["Operator", "Rows", "Update"]


@dataclass(frozen=True)
class Update:
    """What a step did besides its samples, coordinate by coordinate, `[w]` each.

    Args:
        speed: s, so that K = s D.
        scale: c, what the gradient was multiplied by before the step.
        keep: ρ = 1 − lr·λ.
        carry: k, the weight of the momentum buffer in the step.
        decay: β, what the step leaves of the buffer.
        pull: λ D̄, where the weight decay is part of the gradient.
    """

    speed: Tensor
    scale: Tensor
    keep: Tensor
    carry: Tensor
    decay: Tensor
    pull: Tensor

    @classmethod
    def of(cls, scalars: Tensor, entries: Tensor, dtype: torch.dtype) -> Update:
        """From `[parameters, 7]` recorded numbers; `entries` `[w]` names each coordinate's parameter."""
        columns = scalars[entries].to(dtype).unbind(1)
        return cls(*columns[:6])


@dataclass(frozen=True)
class Rows:
    """A step's samples in one block of coordinates.

    Args:
        g: `[n, w]`, P g_i.
        Dg: `[n, w]`, P D g_i.
        a: `[n]`, a_i.
        j: `[m, w]`, a factor of the Gauss-Newton matrix; empty if it was not recorded.
        Dj: `[m, w]`, the same through D.
    """

    g: Tensor
    Dg: Tensor
    a: Tensor
    j: Tensor
    Dj: Tensor

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor, preconditioned: bool) -> Rows:
        """From recorded vectors `[n, parts, w]`."""
        each = 1 + preconditioned
        plain, through = rows[:, ::each], rows[:, each - 1 :: each]
        return cls(
            plain[:, 0], through[:, 0], weights, plain[:, 1:].flatten(0, 1), through[:, 1:].flatten(0, 1)
        )

    def factor(self, curvature: Curvature) -> tuple[Tensor, Tensor]:
        """`[m, w]` twice: x and D y with H = Σ y xᵀ."""
        if curvature == "ggn":
            return self.j, self.Dj
        a = self.a[:, None]
        return torch.where(a != 0, self.g / a, 0.0), self.Dg  # a sample that weighs nothing has no gradient


class Operator:
    """The derivatives of what is looked at by the state (w, n) after a step: A by w, B by n.

    Args:
        width: w, coordinates of the block.
        momentum: whether n is part of the state.
        whole: whether all of the state is looked at, as at the end of an inner segment, or w alone.

    Attributes:
        A: `[looked at, w]`; I − M of the paper where there is no momentum and no decay.
        B: `[looked at, w]`, or None.
    """

    def __init__(self, width: int, dtype: torch.dtype, *, momentum: bool, whole: bool) -> None:
        eye = torch.eye(width, dtype=dtype)
        self.A, self.B = eye, torch.zeros_like(eye) if momentum else None
        if momentum and whole:
            self.A, self.B = torch.cat([eye, torch.zeros_like(eye)]), torch.cat([torch.zeros_like(eye), eye])

    @property
    def whole(self) -> Tensor:
        """`[looked at, w or 2 w]`: the derivatives by the whole state."""
        return self.A if self.B is None else torch.cat([self.A, self.B], 1)

    def back(self, rows: Rows, update: Update, curvature: Curvature) -> Tensor:
        """`[n, looked at]`: the step's embeddings; afterwards A and B stand before the step."""
        C = self.A * update.speed if self.B is None else (self.A * update.speed).sub_(self.B)
        x, Dy = rows.factor(curvature)
        E = (rows.Dg * update.scale) @ C.t()
        F = E if curvature == "fisher" else (Dy * update.scale) @ C.t()
        before = self.A
        self.A = torch.addmm(before * update.keep, F.t(), x, alpha=-1)
        if bool(update.pull.any()):
            self.A -= C * update.pull
        if self.B is not None:
            self.B = (self.B * update.decay).sub_(before * (update.speed * update.carry))
        return E
