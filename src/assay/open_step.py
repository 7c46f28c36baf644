"""What a training loop does beside its backward passes: throws gradients away, moves weights, trains others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from assay.errors import AssayWarning

if TYPE_CHECKING:
    from assay.capture import Coverage
    from assay.distributed import OneProcess
    from assay.optimizers import OptimizerModel

__all__ = ["LATE", "OpenStep"]

LATE = "trained later"  # status of a parameter that is trained and not watched


class OpenStep:
    """Follows the gradients of the open step, and whether what is trained is still what the run watches.

    Args:
        model: that is trained.
        params: the parameters that are watched.
        optimizer: the model of its step.
        processes: that train together.
        coverage: where parameters are entered that are trained and not watched.
    """

    def __init__(
        self,
        model: Module,
        params: Sequence[Parameter],
        optimizer: OptimizerModel,
        processes: OneProcess,
        coverage: Coverage,
    ) -> None:
        self.model, self.params, self.optimizer, self.processes = model, list(params), optimizer, processes
        self.coverage = coverage
        self._trained: list[Tensor] = []
        self._accumulated: list[int] = []
        self._weights: list[int] = []
        self._told_changed = self._told_moved = False

    def begin(self) -> None:
        """The first micro-batch of a step is about to run: who is trained that is not watched?

        A parameter that is frozen meanwhile is a constant from then on; one that is trained only now has a gradient
        that the run was not made for.
        """
        now = self._trained_now()
        if len(now) == len(self._trained) and all(a is b for a, b in zip(now, self._trained, strict=True)):
            return
        self._trained = now
        watched, trained = set(self.params), {id(p) for p in now}
        left_out = self.coverage.left_out
        late = {
            name: p.numel()
            for name, p in self.model.named_parameters()
            if id(p) in trained
            and p not in watched
            and left_out.get(name, (0, ""))[1] not in ("excluded", LATE)
        }
        if late:
            self.coverage.left_out = {**left_out, **{name: (n, LATE) for name, n in late.items()}}
            warnings.warn(
                f"parameter {', '.join(late)} began to be trained after the run began, which watches what was trained "
                "then: values are partial from here on. To value all of it, close the run there and go on in a new one "
                "with an `out` of its own; the values of both add up.",
                AssayWarning,
                stacklevel=2,
            )

    def after_backward(self) -> None:
        """A micro-batch's gradients have been added."""
        self._accumulated = [g._version for g in self.processes.accumulated(self.params)]
        self._weights = [p._version for p in self.params]

    def thrown_away(self) -> bool:
        """Whether the gradients that `after_backward` saw are gone: set to None, or to zero.

        The device is waited for only where the loop has written to them between two micro-batches.
        """
        gradients = self.processes.accumulated(self.params)
        if not gradients:
            return True
        if [g._version for g in gradients] == self._accumulated:
            return False
        norms = torch.stack([x.to(gradients[0].device) for x in torch._foreach_norm(gradients, float("inf"))])
        return not bool(norms.any())

    def go_on(self) -> None:
        """Another micro-batch of the step is about to run: has the loop changed what the ones before it left?"""
        changed = [g._version for g in self.processes.accumulated(self.params)] != self._accumulated
        if changed and not self._told_changed:
            self._told_changed = True
            warnings.warn(
                "the gradients were changed between two micro-batches of one optimizer step (clipped, scaled?); values "
                "of the earlier ones assume that they were not: do it once the last backward pass is over.",
                AssayWarning,
                stacklevel=2,
            )

    def passed_over(self, step: int) -> None:
        """The step does not happen: has somebody moved the weights since its last backward pass?"""
        if [p._version for p in self.params] == self._weights or self._told_moved:
            return
        self._told_moved = True
        warnings.warn(
            f"step {step}: its gradients were thrown away and the weights have moved all the same, but not by the "
            "optimizer that the run was given: the steps of another one are not valued. For a new optimizer close the "
            "run and go on in a new one with an `out` of its own.",
            AssayWarning,
            stacklevel=2,
        )

    def _trained_now(self) -> list[Tensor]:
        return [p for p in self.optimizer.params() if p.requires_grad]
