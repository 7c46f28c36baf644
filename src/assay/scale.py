"""What the training loop did to the gradient between `backward()` and `optimizer.step()`: measured, not asked for.

Clipping, a loss scaler's unscaling and a division by the number of micro-batches all multiply the gradient by one
number c. Its size is the ratio of the gradient's norms at the two moments; its sign is seen in some of the gradient's
entries, which also tell a change that leaves the norm as it is. Where several processes train together, both norms are
those of the reduced gradient, in which a sample's part is multiplied by `share` already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from assay.distributed import OneProcess

__all__ = ["GradientScale"]

SEEN = 256  # entries of each parameter's gradient that are compared one by one


@dataclass(frozen=True)
class _Gradient:
    """What is kept of the gradient at one moment.

    Args:
        present: which parameters have one.
        squares: `[present]`, the squared norm of each gradient.
        seen: `[entries]`, some of the entries of each, one parameter after the other.
        sizes: how many of each.
    """

    present: list[int]
    squares: Tensor
    seen: Tensor
    sizes: list[int]


class GradientScale:
    """Measures c by parameter group.

    Args:
        params: the parameters that are watched.
        groups: the group of each.
        number_of_groups: how many groups there are.
        processes: that train together.
    """

    def __init__(
        self,
        params: Sequence[Parameter],
        groups: Mapping[Parameter, int],
        number_of_groups: int,
        processes: OneProcess,
    ) -> None:
        self.params, self.number_of_groups, self.processes = list(params), number_of_groups, processes
        self.groups = [groups[p] for p in self.params]
        self._after_backward: _Gradient | None = None
        self._index: tuple[list[int], list[int], Tensor, Tensor] | None = None

    def after_backward(self) -> None:
        """Look at the gradient that backward produced."""
        self._after_backward = self._look()

    def before_step(self) -> tuple[Tensor, Tensor]:
        """`[groups]` what a sample's gradient was multiplied by, c times `share`, and a 0-dim tensor: the gap.

        The second is the largest relative disagreement between what the parameters' own gradients were multiplied by
        and their group's c; it is zero, up to the rounding of the gradients, for anything that multiplies them by one
        number.
        """
        assert self._after_backward is not None
        old, now = self._after_backward, self._look()
        if old.present != now.present or not old.present:
            here = self.params[0].device
            share = torch.full((self.number_of_groups,), self.processes.share, device=here)
            return share, torch.full((), float("inf"), device=here)
        group, param = self._places(old)
        dots = self._sums(old.seen * now.seen, param, len(old.present))
        before, after, along = (self._sums(x, group, self.number_of_groups) for x in (
            old.squares, now.squares, self._whole(dots)))  # fmt: skip
        scale = torch.where(before > 0, (after / before).sqrt(), torch.ones_like(before))
        scale = torch.where(along < 0, -scale, scale)
        gap = torch.maximum(
            self._gap_of_norms(old, now, scale[group]), self._gap_of_entries(old, now, scale, group, param)
        )
        rounding = max(
            torch.finfo(self.params[i].dtype).eps for i in old.present
        )  # of each entry, when it was scaled
        return self.processes.share * scale, (gap.max() - 2 * rounding).clamp_min(0)

    def _look(self) -> _Gradient:
        present = [i for i, p in enumerate(self.params) if p.grad is not None]
        gradients = [self.processes.held(g) for i in present if (g := self.params[i].grad) is not None]
        if not gradients:
            return _Gradient(present, torch.zeros(0), torch.zeros(0), [])
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        squares = torch.stack(torch._foreach_norm(gradients, 2, wide)).square()
        seen = [_some_of(g) for g in gradients]
        return _Gradient(present, self._whole(squares), torch.cat(seen).to(wide), [len(x) for x in seen])

    def _whole(self, of_parts: Tensor) -> Tensor:
        return self.processes.whole(of_parts) if self.processes.sharded else of_parts

    def _places(self, gradient: _Gradient) -> tuple[Tensor, Tensor]:
        """The group of each parameter, and the parameter of each entry that is seen; the same from step to step."""
        if self._index is None or self._index[:2] != (gradient.present, gradient.sizes):
            device = gradient.squares.device
            group = torch.tensor([self.groups[i] for i in gradient.present], device=device)
            param = (
                torch.arange(len(gradient.sizes)).repeat_interleave(torch.tensor(gradient.sizes)).to(device)
            )
            self._index = gradient.present, gradient.sizes, group, param
        return self._index[2:]

    def _gap_of_norms(self, old: _Gradient, now: _Gradient, scale: Tensor) -> Tensor:
        """`[present]`, each gradient's norm against the one that its group's c makes of it."""
        expected = scale.abs() * old.squares.sqrt()
        return _relative(now.squares.sqrt() - expected, expected)

    def _gap_of_entries(
        self, old: _Gradient, now: _Gradient, scale: Tensor, group: Tensor, param: Tensor
    ) -> Tensor:
        """`[present]`, the same of the entries that are seen."""
        n, expected = len(old.present), scale[group][param] * old.seen
        off, size = (self._sums(x.square(), param, n).sqrt() for x in (now.seen - expected, expected))
        return _relative(off, size)

    @staticmethod
    def _sums(x: Tensor, index: Tensor, n: int) -> Tensor:
        return x.new_zeros(n).index_add(0, index, x)


def _some_of(gradient: Tensor) -> Tensor:
    """`[at most SEEN]`, entries at equal distances."""
    n = gradient.numel()
    whole = gradient.t() if gradient.dim() == 2 and not gradient.is_contiguous() else gradient
    return whole.reshape(-1)[:: -(-n // SEEN) or 1]  # a view, but for rare strides


def _relative(off: Tensor, size: Tensor) -> Tensor:
    return torch.where(
        size > 0, off.abs() / size.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(size)
    )
