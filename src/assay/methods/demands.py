"""Several methods in one run: one capture serves them all, and each gets back what it asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture import Capture
from assay.capture.marks import Directions
from assay.errors import InputError
from assay.methods.base import Demand, Method, MicroBatch, Watch

__all__ = [
    "Demands",
    "Watches",
    "check_for_resuming",
    "check_for_several_processes",
    "check_methods",
    "sample_weights",
]

Watches = list[Watch | None]


@dataclass(frozen=True)
class Demands:
    """What the methods of a run want of the coming micro-batches, together.

    Args:
        each: one per method, in order; at most one has directions, as only one writes values.
    """

    each: Sequence[Demand] = ()

    @property
    def directions(self) -> Directions | None:
        """`{parameter: [targets, *shape]}` of the method that has any."""
        return next((demand.directions for demand in self.each if demand.directions is not None), None)

    @property
    def keep(self) -> set[Parameter]:
        """The parameters that any method keeps."""
        return {p for demand in self.each for p in demand.keep}

    @property
    def rounded(self) -> bool:
        """Whether all methods that keep gradients are content with bfloat16."""
        return all(demand.rounded for demand in self.each if demand.keep)

    @property
    def by_token(self) -> bool:
        """Whether any method takes what it keeps apart by token."""
        return any(demand.by_token for demand in self.each)

    @property
    def measures(self) -> bool:
        """Whether any method wants anything of the per-sample gradients."""
        return any(demand.measures for demand in self.each)

    def before(self) -> None:
        """Let those know that asked for it that a micro-batch begins."""
        for demand in self.each:
            if demand.before is not None:
                demand.before()

    def watch(self, capture: Capture, closing: ExitStack) -> Watches:
        """Start the methods' own watches of a micro-batch; they are closed with `closing`."""
        watches: Watches = []
        for demand in self.each:
            watch = None if demand.watch is None else demand.watch(capture)
            if watch is not None:
                closing.callback(watch.close)
            watches.append(watch)
        return watches

    def parts(self, batch: MicroBatch, watches: Watches | None = None) -> list[MicroBatch]:
        """Each method's part of a micro-batch: its own watch, and what was kept if it asked for that."""
        return [
            replace(batch, kept=list(batch.kept) if demand.keep else [], watch=watch)
            for demand, watch in zip(self.each, watches or [None] * len(self.each), strict=True)
        ]


def check_methods(methods: Sequence[Method]) -> None:
    """Refuse what cannot run side by side.

    Raises:
        InputError: there is no method, two write values, or one is there twice.
    """
    if not methods:
        raise InputError("Run(methods=[...]): there is nothing to measure; give at least one method.")
    kinds = [type(method) for method in methods]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise InputError(
            f"Run(methods=[...]): {twice.__name__} is there twice; give it once, with the targets or settings of both."
        )


def check_for_several_processes(methods: Sequence[Method]) -> None:
    """Refuse methods that know of their own process only.

    Raises:
        InputError: names the first one.
    """
    for method in methods:
        if not getattr(method, "several_processes", False):
            raise InputError(
                f"Run(methods=[...]): {type(method).__name__} records what one process sees; train in one process with "
                "it, or value this run by InRunShapley alone."
            )


def check_for_resuming(methods: Sequence[Method]) -> None:
    """Refuse methods that begin anew with every process.

    Raises:
        InputError: names the first one.
    """
    for method in methods:
        if not getattr(method, "resumes", False):
            raise InputError(
                f"Run(resume=...): {type(method).__name__} does not go on with what another process recorded; choose "
                "another out= for the rest of the training."
            )


def sample_weights(weights: Sequence[float] | Tensor | None, samples: int) -> Tensor | None:
    """`[B]` float64, as given to `run.step`.

    Raises:
        InputError: another number of them, or one that is negative or not finite.
    """
    if weights is None:
        return None
    found = (
        torch.as_tensor(weights, dtype=torch.float64).detach().cpu().clone()
    )  # the user's may be written to
    if found.shape != (samples,):
        raise InputError(
            f"run.step(ids, weights): {samples} ids and weights of shape {list(found.shape)}; give one per id."
        )
    if not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise InputError(
            "run.step(ids, weights): a weight is negative or not finite; give a_i of L = Σ a_i ℓ_i."
        )
    return found
