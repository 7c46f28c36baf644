"""Whether what the backward passes of a micro-batch added to `.grad` still stands there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

from assay.errors import InputError

__all__ = ["Accumulated"]

State = tuple[int, int] | None  # of a gradient: which tensor it is, and how often that was written to


class Accumulated:
    """Watches the gradients of some parameters between the backward passes of one micro-batch."""

    def __init__(self, params: Sequence[Parameter]) -> None:
        self._params = params
        self._left: list[State] = []

    def note(self) -> None:
        """A backward pass is over."""
        self._left = [_state(p.grad) for p in self._params]

    @property
    def empty(self) -> bool:
        """Whether no backward pass was noted yet."""
        return not self._left

    def gone(self) -> bool:
        """Another begins: whether the gradients were zeroed since.

        Raises:
            InputError: something else was done to them, or to some of them only.
        """
        zeroed = standing = False
        for p, left in zip(self._params, self._left, strict=False):  # nothing is left before the first pass
            grad = p.grad
            if left is None or (grad is not None and left == _state(grad)):
                standing |= left is not None
                continue
            if grad is None or not bool(grad.any()):
                zeroed = True
                continue
            standing = True
            if id(grad) == left[0]:
                raise InputError(
                    "run.step(ids): the gradients were changed between two backward passes inside, so that a sample's "
                    "part in the first is no longer known; clip, scale or step once the block is over, or give each "
                    "backward pass a run.step of its own."
                )
        if zeroed and standing:
            raise InputError(
                "run.step(ids): between two backward passes inside some gradients were zeroed and others were not, so "
                "that what remains of the first is not known; zero all of them, or give each backward pass a run.step "
                "of its own."
            )
        return zeroed


def _state(grad: Tensor | None) -> State:
    return None if grad is None else (id(grad), grad._version)
