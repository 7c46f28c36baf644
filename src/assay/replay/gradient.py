"""A micro-batch's gradient in the replay: watched by the capture, with a graph where it is differentiated again.

The graph may be kept while the optimizer steps on: what it holds of the parameters is remembered by name, so that it
is complete again as soon as the parameters have the values of its step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from assay.capture import Coverage, Weights
from assay.capture.check import check_capture
from assay.capture.fallback import Boundary
from assay.capture.marks import Directions
from assay.errors import InputError
from assay.replay.flat import Flat
from assay.replay.twice import TwiceCapture
from assay.snapshots import RandomState, set_random_state
from assay.targets import without_reentrant_checkpoints

__all__ = ["Gradients", "Taken"]


class Taken:
    """One micro-batch's gradient.

    Args:
        capture: that watched it.
        loss: of the micro-batch.
        of_weights: its gradients with respect to the flat parameters, where they were asked for.
        probe: the capture's answer; None where the loss does not use the model.
        boundary: of the capture.
        held: bytes of the graph beside the parameters.
    """

    def __init__(
        self,
        capture: TwiceCapture,
        loss: Tensor,
        of_weights: list[Tensor | None],
        probe: Tensor | None,
        boundary: Boundary,
        held: int,
    ) -> None:
        self.capture, self.loss, self.of_weights = capture, loss.detach(), of_weights
        self.held = held
        self._probe, self._boundary = probe, boundary

    def scores(self) -> Tensor:
        """`[targets, B]`: ⟨g_i, G⟩ along the directions that it was taken with.

        Raises:
            InputError: the loss has nothing to do with the model.
        """
        self.capture.probe.grad = None if self._probe is None else self._probe.detach()
        scores = self._boundary.finish()
        if scores is None:
            raise InputError("adjoint(loss_fn): it did not use the model, or its loss has no gradient.")
        return scores.detach().sum(0)

    def accumulate(self, flat: Flat) -> None:
        """Add the weights' gradients to `.grad`, as `backward()` does."""
        for p, g in zip(flat.params, self.of_weights, strict=True):
            if g is not None:
                p.grad = g.detach() if p.grad is None else p.grad + g.detach()
        self.of_weights = []

    def close(self) -> None:
        """Let go of the graph, which leads back to the capture: nothing else would end that circle."""
        self.capture.put_aside.clear()
        self.of_weights = []


class Gradients:
    """Takes them, at the model's present weights.

    Args:
        model: in the modes that it was trained in.
        flat: its parameters.
        loss_fn: the loss that was differentiated.
        exclude: names of parameters whose per-sample gradients are left out of the values.
    """

    def __init__(
        self, model: Module, flat: Flat, loss_fn: Callable[[Module, Any], Tensor], exclude: Sequence[str] = ()
    ) -> None:
        self.model, self.flat, self.loss_fn = model, flat, loss_fn
        named = [(n, p) for n, p in zip(flat.names, flat.params, strict=True) if n not in exclude]
        self.weights = Weights(named, dict.fromkeys(flat.params, 0), model.buffers())
        self.coverage = Coverage(self.weights.names)
        self._checked = False

    def take(
        self,
        batch: Any,
        rows: int,
        random: RandomState,
        along: Directions | None = None,
        *,
        twice: bool = False,
        of_weights: bool = True,
        held: bool = False,
    ) -> Taken:
        """A forward and a backward pass under the capture.

        Args:
            batch: the micro-batch.
            rows: B, its samples.
            random: the state of the generators that its forward pass started from.
            along: directions of the per-sample inner products; without them the uses of the weights are put aside,
                with their history, for `assay.replay.links`.
            twice: whether the gradient gets a graph.
            of_weights: whether the weights' gradients are formed.
            held: whether the graph has to outlast changes of the parameters.
        """
        capture = TwiceCapture(self.weights, rows, along, strict=True, coverage=self.coverage)
        capture.linked = along is None
        hook = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: self._see_input(capture, args, kwargs), with_kwargs=True
        )
        inputs = [*(self.flat.params if of_weights else ()), capture.probe]
        keeper = _Keeper(self.flat.params)
        try:
            with ExitStack() as stack:
                stack.enter_context(self.surroundings(random))
                if held:
                    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keeper.pack, keeper.unpack))
                boundary = stack.enter_context(Boundary(self.model, self.weights, capture))
                stack.enter_context(capture)
                loss = self.loss_fn(self.model, batch)
                *found, probe = torch.autograd.grad(loss, inputs, create_graph=twice, allow_unused=True)
        finally:
            hook.remove()
            capture.measuring = False
        return Taken(capture, loss, list(found), probe, boundary, keeper.bytes)

    def _see_input(self, capture: TwiceCapture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The samples are the rows of the model's inputs; once, the start-up check finds what needs a fallback."""
        if capture.paused:
            return
        for tensor in tree_leaves((args, dict(kwargs))):
            if isinstance(tensor, Tensor):
                capture.enter(tensor)
        if not self._checked and capture.batch > 1:
            self._checked = True
            capture.paused = True
            try:
                check_capture(self.model, args, kwargs, self.weights, capture.batch, self.coverage)
            finally:
                capture.paused = False

    @contextmanager
    def surroundings(self, random: RandomState) -> Iterator[None]:
        """The generators as in the run; eager code and kernels that have second derivatives."""
        set_random_state(random)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(without_reentrant_checkpoints())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield


class _Keeper:
    """What a graph saves: parameters by reference, so that they may change and come back, all else as it is."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = {p.untyped_storage().data_ptr(): p for p in params}
        self._seen: set[int] = set()
        self.bytes = 0

    def pack(self, x: Tensor) -> Any:
        with torch._C.DisableTorchFunction():  # inside the capture, for every tensor that is saved
            place = x.data_ptr() - int(x.storage_offset()) * x.element_size()  # of its memory, at less cost
            param = self._params.get(place)
            if param is not None and param.dtype == x.dtype:
                return param, x.size(), x.stride(), x.storage_offset()
            if place not in self._seen:
                self._seen.add(place)
                self.bytes += x.untyped_storage().nbytes()
            return x

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        param, size, stride, offset = packed
        with torch._C.DisableTorchFunction():
            return param.detach().as_strided(size, stride, offset)  # type: ignore[no-any-return]
