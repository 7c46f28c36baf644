"""Values at the left end in full precision; what the rest of the step adds, from per-sample gradients in half of it.

For any quadrature v_i = Ḡᵀ K g_i = ∇ℓ(w_t)ᵀ K g_i + (Ḡ − ∇ℓ(w_t))ᵀ K g_i. The first term is formed while g_i is at
hand. The second is of the order of the step and waits for the right end, from g̃_i in bfloat16. Its total over the
samples is known without them, (Ḡ − ∇ℓ(w_t))ᵀ K Σ_i g_i: what rounding makes the second terms miss of it is spread over
them in proportion to their squares, so that a step's total has no error and only its division among the samples has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.held import total
from assay.capture.marks import Directions
from assay.capture.rounding import rounded
from assay.distributed import local
from assay.methods.step import Step, along

__all__ = ["Correction"]


@dataclass
class Correction:
    """A step whose values at the left end are known.

    Args:
        step: with rounded gradients.
        left: ∇ℓ(w_t).
        values: `[targets, B]` by micro-batch: the left end's.
        own: K Σ_i g_i, as this process holds it.
    """

    step: Step
    left: Directions
    values: list[Tensor]
    own: Mapping[Parameter, Tensor]

    @classmethod
    def of(
        cls, step: Step, left: Directions, values: list[Tensor], lr: Mapping[Parameter, Tensor | float]
    ) -> Correction:
        """In the optimizer's pre-hook; from here on the step's gradients are rounded.

        Args:
            step: the coming step.
            left: ∇ℓ(w_t).
            values: the left end's.
            lr: learning rate of each parameter that moves.
        """
        own = {p: lr[p] * gain * local(p.grad) for p, gain in step.gains.items() if p.grad is not None}
        for batch in step.batches:
            for n, (weight, factors) in enumerate(batch.kept):  # one by one, so that never two lists are held
                batch.kept[n] = weight, rounded(factors)
        return cls(step, left, values, own)

    def corrected(self, gradient: Directions) -> list[Tensor]:
        """`[targets, B]` by micro-batch, for the mean gradient Ḡ along the step."""
        apart = total([(1.0, gradient), (-1.0, self.left)])
        processes = self.step.processes
        found = self.step.values(apart)
        whole = processes.whole(torch.stack([along(apart[p], x) for p, x in self.own.items()]).sum(0))
        sizes = [x.square() for x in found]
        sums = torch.stack([torch.stack([x.sum(1) for x in some]).sum(0) for some in (found, sizes)])
        seen, size = processes.total(sums)  # [targets] each
        pull = torch.where(size > 0, (whole - seen) / size, 0.0)[:, None]
        return [v + x + pull * s for v, x, s in zip(self.values, found, sizes, strict=True)]
