"""Where a run stands in `optimizer.step()`: between the last change to the gradient and the weights' move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["StepHooks"]


class StepHooks:
    """Calls the run before and after each step of an optimizer.

    Args:
        optimizer: torch's own.
        before: called when the gradient is as the step will use it, the weights not yet moved.
        after: called when they have moved.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._before = optimizer.register_step_pre_hook(
            lambda _, args, kwargs: _after_closure(args, kwargs, before)
        )
        self._after = optimizer.register_step_post_hook(lambda *_: after())

    def come_last(self) -> None:
        """Stand behind the hooks that others have registered meanwhile: what they do to the gradient counts."""
        hooks = self._optimizer._optimizer_step_pre_hooks
        if next(reversed(hooks)) != self._before.id:
            hooks[self._before.id] = hooks.pop(self._before.id)

    def remove(self) -> None:
        """Let go of the optimizer."""
        self._before.remove()
        self._after.remove()


def _after_closure(args: Any, kwargs: Any, before_update: Callable[[], None]) -> tuple[Any, Any] | None:
    """Look at the gradient when it is there: before the step, or after the closure that the step is given."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        before_update()
        return None

    def evaluate() -> Any:
        loss = closure()
        before_update()
        return loss

    return args[:1], {**kwargs, "closure": evaluate}
