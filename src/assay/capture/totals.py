"""The totals of the first step: the per-sample gradients must add up to `.grad`, with the user's own loss.

No unseen use of a parameter survives this, whatever the model returns: Σ_i ⟨g_i, G⟩ = ⟨.grad, G⟩ for a random G. Where
several processes train together, the samples of all of them must add up to the reduced gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.factors import Factors
from assay.capture.marks import Directions, Weight
from assay.capture.precision import Roundings
from assay.capture.weights import Weights
from assay.errors import CoverageError

__all__ = ["Processes", "Totals"]

TOLERANCE = {torch.float64: 1e-6}  # of ‖.grad‖·rms(G); 5e-3 of all others
ROUNDINGS, ALONE = (
    1.5,
    4,
)  # of what half precision rounds: of all parameters, and of one, where less evens out

Kept = list[tuple[Weight, Factors]]


class Processes(Protocol):
    """What the check must know of the processes that train together; `distributed.OneProcess` says what is what."""

    @property
    def share(self) -> float:
        """What a sample's gradient is multiplied by when the gradients are reduced."""

    @property
    def hint(self) -> str:
        """What may be wrong where the samples do not add up to the gradient."""

    def contract(self, kept: Kept, directions: Directions, like: Tensor) -> Tensor:
        """Inner products of kept gradients with directions as a process holds them."""

    def held(self, x: Tensor) -> Tensor:
        """What this process holds of a parameter or its gradient."""

    def part(self, whole: Tensor, param: Parameter) -> Tensor:
        """What this process holds of a tensor of the parameter's whole shape."""

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes."""

    def whole(self, x: Tensor) -> Tensor:
        """Inner products of whole tensors from those of the parts."""


class Totals:
    """Compares what was kept of the micro-batches of a step with what their backward passes left in `.grad`.

    Made before the first micro-batch: what `.grad` holds then is not theirs. It adds to it, unless the loop clears it
    inside of the step.

    Args:
        weights: the watched parameters.
        processes: that train together.
    """

    @torch.no_grad()
    def __init__(self, weights: Weights, processes: Processes) -> None:
        self.weights, self.processes = weights, processes
        self._before = self._gradients()
        self._kept: list[tuple[Kept, Tensor]] = []

    def add(self, kept: Kept, like: Tensor) -> None:
        """One more micro-batch: the per-sample gradients of all uses, and its scores `[groups, any, B]`."""
        self._kept.append((kept, like))

    @torch.no_grad()
    def check(self) -> None:
        """Compare, once the last backward pass has reduced the gradients over the processes.

        Raises:
            CoverageError: names the parameters for which they differ.
        """
        before, _ = self._before
        after, squares = self._gradients()
        if not bool(torch.isfinite(after).all() & torch.isfinite(squares).all()):
            return  # a step that overflowed says nothing
        added = after - self.processes.total(before) * self.processes.share
        directions = {p: self.processes.part(_random(p), p)[None] for p in self.weights.params}
        rounded = self._rounded()
        if any(self._agree(directions, new, squares, rounded) for new in (added, after)):
            return
        zero = {p: torch.zeros_like(direction) for p, direction in directions.items()}
        wrong = [
            name
            for k, (p, name) in enumerate(self.weights.names.items())
            if not self._agree({**zero, p: directions[p]}, added, squares, rounded, [k])
        ]
        if wrong:
            raise CoverageError(
                f"the per-sample gradients of {', '.join(wrong)} do not add up to .grad: a use of it was not seen. Is "
                "it used inside a custom autograd.Function, through a copy made outside run.step, or in a term of the "
                f"loss that is no sample's? Use a plain torch operation, or pass exclude={wrong} (scores are then "
                f"partial).{self.processes.hint}{self.weights.hooked()}"
            )

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """`[parameters]` ⟨.grad, G⟩ and ‖.grad‖², zero where there is none."""
        found = []
        for p in self.weights.params:
            g = torch.zeros((), device=p.device) if p.grad is None else self.processes.held(p.grad).detach()
            wide = g.to(torch.promote_types(p.dtype, torch.float32))
            G = self.processes.part(_random(p), p) if p.grad is not None else wide
            found.append(torch.stack([(wide * G.to(wide.dtype)).sum(), wide.square().sum()]).double())
        products, squares = self.processes.whole(torch.stack(found, 1))
        return products, squares

    def _agree(
        self,
        directions: Mapping[Parameter, Tensor],
        added: Tensor,
        squares: Tensor,
        rounded: Tensor,
        which: Sequence[int] | None = None,
    ) -> bool:
        """Whether the samples add up along directions that are zero for all parameters but `which`, by number."""
        some = slice(None) if which is None else which
        seen, parts = self._seen(directions)
        bounds = [TOLERANCE.get(self.weights.used(p).dtype, 5e-3) ** 2 for p in self.weights.params]
        limit = (squares[some] * torch.tensor(bounds).to(squares)[some]).sum()
        half = (squares[some] * rounded[some]).sum() + parts * rounded[some].max()
        limit += (ROUNDINGS if which is None else ALONE) ** 2 * half
        return bool((seen - added[some].sum()).abs() <= limit.sqrt() + 1e-30)

    def _seen(self, directions: Mapping[Parameter, Tensor]) -> tuple[Tensor, Tensor]:
        """Σ_i ⟨g_i, G⟩ over the samples of all processes, as it is in the reduced gradient, and Σ_i ⟨g_i, G⟩²."""
        own = [self.processes.contract(kept, directions, like).double() for kept, like in self._kept]
        found = torch.stack([torch.stack([x.sum(), x.square().sum()]) for x in own]).sum(0)
        total, parts = self.processes.total(found).unbind()
        return total * self.processes.share, parts * self.processes.share**2

    def _rounded(self) -> Tensor:
        """`[parameters]`: ε² n of each (`Roundings`), the mean over the processes."""
        roundings = Roundings()
        for weight, factors in chain.from_iterable(kept for kept, _ in self._kept):
            roundings.add(weight.params, factors)
        found = roundings.found()
        own = torch.tensor([*(found.get(p, 0.0) for p in self.weights.params), 1.0], dtype=torch.float64)
        total = self.processes.total(own.to(self._kept[0][1].device))
        return total[:-1] / total[-1]


def _random(param: Parameter) -> Tensor:
    """A random direction of the parameter's whole shape, from a generator of its own."""
    generator = torch.Generator(device=param.device).manual_seed(param.numel())
    return torch.randn(param.shape, generator=generator, dtype=param.dtype, device=param.device)
