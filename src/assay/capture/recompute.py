"""Forward passes of the model that can be taken again: time in place of the memory of per-sample gradients.

Of every forward pass in a micro-batch are kept its inputs, the state of the random numbers, buffers and modes before
it, and the gradients ∂L/∂out that came back for its outputs. Taken again at the same weights, and driven backwards by
these gradients, it has every sample's gradient once more, and nobody needs to know the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from assay.capture.coverage import Coverage
from assay.capture.fallback import Boundary
from assay.capture.held import number_of
from assay.capture.marks import Directions
from assay.capture.mode import Capture
from assay.capture.passes import Pass, differentiable, recorded, surroundings
from assay.capture.weights import Weights
from assay.errors import CoverageError
from assay.targets import without_reentrant_checkpoints

__all__ = ["Recompute"]


class Recompute:
    """Keeps a micro-batch's forward passes from now on until `close`, and takes them again when directions are known.

    Args:
        model: the model.
        weights: the watched parameters.
        capture: the capture of this micro-batch; it need neither measure nor keep anything.
    """

    def __init__(self, model: Module, weights: Weights, capture: Capture) -> None:
        self.model, self.weights, self.batch = model, weights, capture.batch
        self.passes: list[Pass] = []
        self._capture: Capture | None = capture
        self._device = weights.params[0].device
        self._uses = 0  # of weights inside the model's own forward passes; once closed, less all uses
        self._open: list[tuple[Pass, int] | None] = []
        capture.forgets.append(self._forget)
        capture.inseparable = "memory='recompute'"
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, model: Module, args: Any, kwargs: Any) -> None:
        capture = self._capture
        assert capture is not None
        if capture.paused or not torch.is_grad_enabled():
            self._open.append(None)
            return
        with capture.unseen():
            self._open.append(
                (recorded(model, self._device, args, kwargs, self.weights.outside), capture.uses)
            )

    def _after(self, model: Module, args: Any, kwargs: Any, out: Any) -> Any:
        opened, capture = self._open.pop() if self._open else None, self._capture
        if opened is None:
            return None
        assert capture is not None
        record, uses = opened
        self._uses += capture.uses - uses
        leaves, spec = tree_flatten(out)
        record.places = differentiable(leaves)
        for k, place in enumerate(record.places):
            x = leaves[place]
            with capture.unseen():
                record.sums.append(x.detach().double().sum())
            leaves[place] = x.view_as(x)  # what the caller gets: its gradient is what came from outside
            leaves[place].register_hook(_receiver(record, k, capture))
        self.passes.append(record)
        return tree_unflatten(leaves, spec)

    def _forget(self) -> None:
        for record in self.passes:
            record.gradients.clear()

    def close(self) -> None:
        """The micro-batch is over: watch no longer, and let go of its capture."""
        for hook in self._hooks:
            hook.remove()
        if self._capture is not None:
            self._uses -= self._capture.uses
            self._capture = None

    def products(self, directions: Directions, like: Tensor) -> Tensor:
        """`[groups, targets, B]`: ⟨g_i, G_n⟩ with the model's present weights, which must be those of the pass.

        Args:
            directions: `{parameter: [targets, *shape]}`.
            like: the micro-batch's own scores.

        Raises:
            CoverageError: weights met samples outside the model's forward passes, or these give other outputs when
                they are repeated.
        """
        if self._uses:
            raise CoverageError(
                f"memory='recompute' takes the model's own forward pass again, but {-self._uses} uses of its "
                "parameters lie outside of that (a loss that reads a weight, a submodule called on its own); move "
                "them into forward(), or choose memory='keep'."
            )
        targets = number_of(directions)
        scores = like.new_zeros(like.shape[0], targets, like.shape[2])
        for record in self.passes:
            if not record.gradients:  # nothing came back for its outputs
                continue
            capture = Capture(
                self.weights, self.batch, directions, strict=True, coverage=Coverage(self.weights.names)
            )
            with (
                without_reentrant_checkpoints(),
                torch.enable_grad(),
                _buffers(self.model, record.buffers),
                Boundary(self.model, self.weights, capture) as boundary,
                capture.marking(),
                capture,
            ):
                found = self._forward(capture, record)
                roots = [found[k] for k in record.gradients]
                seeds = list(record.gradients.values())
                (capture.probe.grad,) = torch.autograd.grad(roots, [capture.probe], seeds)
            measured = boundary.finish()
            assert measured is not None
            scores += measured
        return scores

    def _forward(self, capture: Capture, record: Pass) -> dict[int, Tensor]:
        for x in tree_leaves((record.args, record.kwargs)):
            if isinstance(x, Tensor):
                capture.enter(x)
        with surroundings(self.model, record, self._device):
            leaves = tree_leaves(self.model(*record.args, **record.kwargs))
        found = {k: leaves[place] for k, place in enumerate(record.places) if k in record.gradients}
        with capture.unseen():
            if not record.is_repeated_by(found):
                raise CoverageError(
                    "memory='recompute': the model's forward pass gives other outputs when it is taken again, so its "
                    "gradients would be others too (state outside of buffers? random numbers of its own?); choose "
                    "memory='keep'."
                )
        return found


@contextmanager
def _buffers(model: Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other contents of the model's buffers inside."""
    with torch.no_grad():
        before = {name: b.clone() for name, b in model.named_buffers()}
        for name, b in model.named_buffers():
            b.copy_(values[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(before[name])


def _receiver(record: Pass, output: int, capture: Capture) -> Any:
    def receive(gradient: Tensor) -> None:
        if capture.idle:
            return
        with torch._C.DisableTorchFunction():
            record.came_back(output, gradient)

    return receive
