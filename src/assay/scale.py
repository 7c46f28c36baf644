"""What the training loop did to the gradient between `backward()` and `optimizer.step()`: measured, not asked for.

Clipping, a loss scaler's unscaling and a division by the number of micro-batches all multiply the gradient by one
number c. It is the ratio of the gradient's norms at the two moments. Where several processes train together, both are
norms of the reduced gradient, in which a sample's part is multiplied by `share` already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from assay.distributed import OneProcess

__all__ = ["GradientScale"]


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
        self._after_backward: tuple[list[int], Tensor] | None = None
        self._index: tuple[list[int], Tensor] | None = None

    def norms(self) -> tuple[list[int], Tensor]:
        """The parameters that have a gradient, and the norm of each gradient."""
        present = [i for i, p in enumerate(self.params) if p.grad is not None]
        gradients = [self.processes.held(g) for i in present if (g := self.params[i].grad) is not None]
        if not gradients:
            return present, torch.zeros(0)
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(gradients, 2, wide))
        return present, self.processes.whole(norms.square()).sqrt() if self.processes.sharded else norms

    def after_backward(self) -> None:
        """Take the norms of the gradient that backward produced."""
        self._after_backward = self.norms()

    def before_step(self) -> tuple[Tensor, Tensor]:
        """`[groups]` what a sample's gradient was multiplied by, c times `share`, and a 0-dim tensor: the gap.

        The second is the largest relative disagreement between the parameters' own ratios and their group's; it is
        zero, up to the rounding of the gradients, for anything that multiplies them by one number.
        """
        assert self._after_backward is not None
        present, norms = self._after_backward
        now_present, now = self.norms()
        if present != now_present or not present:
            here = self.params[0].device
            share = torch.full((self.number_of_groups,), self.processes.share, device=here)
            return share, torch.full((), float("inf"), device=here)
        group = self._groups_of(present, norms.device)
        zeros = norms.new_zeros(self.number_of_groups)
        before = zeros.index_add(0, group, norms.square())
        after = zeros.index_add(0, group, now.square())
        scale = torch.where(before > 0, (after / before).sqrt(), torch.ones_like(before))
        size = (scale[group] * norms).clamp_min(torch.finfo(norms.dtype).tiny)
        gap = torch.where(norms > 0, (now - scale[group] * norms).abs() / size, torch.zeros_like(norms))
        rounding = max(
            torch.finfo(self.params[i].dtype).eps for i in present
        )  # of each entry, when it was scaled
        return self.processes.share * scale, (gap.max() - 2 * rounding).clamp_min(0)

    def _groups_of(self, present: list[int], device: torch.device) -> Tensor:
        """The group of each of these parameters, on the device; they are the same from step to step."""
        if self._index is None or self._index[0] != present:
            self._index = present, torch.tensor([self.groups[i] for i in present], device=device)
        return self._index[1]
