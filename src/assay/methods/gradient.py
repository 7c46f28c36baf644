"""How the targets' gradients are held until they are contracted, `InRunShapley(target_gradient=...)`.

| form | held on the device | written out |
|---|---|---|
| full | as autograd gives it | – |
| bfloat16 | half of that | one parameter at a time |
| cpu | nothing; it is in pinned host memory | one parameter at a time, the next one on its way |
| factors | activations and output gradients, where they are smaller | one parameter at a time, or never |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.factored import FactoredPass
from assay.capture.held import Low, joined
from assay.capture.host import Conveyor, OnHost
from assay.capture.marks import Directions
from assay.capture.weights import Weights
from assay.distributed import OneProcess
from assay.errors import InputError
from assay.targets import Target, TargetPass

__all__ = ["FORMS", "TargetGradients"]

FORMS = ("full", "bfloat16", "cpu", "factors")

Hold = Callable[[dict[Parameter, Tensor]], Directions]


class TargetGradients:
    """Takes losses and gradients of all targets at the present weights, and holds the gradients in one form.

    Args:
        form: one of `FORMS`.
        processes: that train together.
        targets: name → target.
        weights: the watched parameters.

    Attributes:
        passes: the targets' passes.

    Raises:
        InputError: several processes train together, and the form is known to one only.
    """

    def __init__(
        self, form: str, processes: OneProcess, targets: Mapping[str, Target], weights: Weights
    ) -> None:
        self.form = form
        self.passes: TargetPass
        if form == "factors":
            if processes.size > 1:
                raise InputError(
                    "InRunShapley(target_gradient='factors') holds the factors of one process's validation batches, "
                    f"and {processes.size} train together; choose target_gradient='bfloat16' or 'cpu'."
                )
            self.passes = FactoredPass(processes.module, targets, weights, processes.precision)
        else:
            self.passes = processes.target_pass(targets, weights.params)
        conveyor = Conveyor()
        holds: dict[str, Hold] = {"bfloat16": Low, "cpu": lambda gradient: OnHost(gradient, conveyor)}
        self._hold: Hold = holds.get(form, lambda gradient: gradient)

    def take(self) -> tuple[Tensor, Directions]:
        """`[targets]` losses and `{parameter: [targets, *shape]}` gradients."""
        if self.form == "full":
            return self.passes.gradients()
        losses, held = [], []
        for loss, gradient in self.passes.pieces():
            losses.append(loss)
            held.append(self._hold(gradient))
        return torch.cat(losses), joined(held)

    def retake(self) -> tuple[Tensor, Directions]:
        """`take`, in another precision than before: which factors are smaller may have changed."""
        if isinstance(self.passes, FactoredPass):
            self.passes.forget()
        return self.take()

    def again(self, gradient: dict[Parameter, Tensor]) -> Directions:
        """Hold something of the gradients' shape, which is emptied on the way."""
        return self._hold(gradient)
