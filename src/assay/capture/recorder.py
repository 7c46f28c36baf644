"""What becomes of the factored gradients of a use: measured along directions, kept, shown to those who take them.

The nodes of `probe` call it in the backward pass, with what a use leaves (`factors`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.factors import Factors, apart_from, own_memory
from assay.capture.held import Held, number_of
from assay.capture.marks import Directions, Weight
from assay.capture.products import products, through_pairs
from assay.capture.room import Room
from assay.capture.rounding import rounded
from assay.capture.weights import Weights
from assay.errors import CoverageError
from assay.faults import Faults

__all__ = ["WHOLE", "Recorder"]

WHOLE = slice(None)  # all samples of a micro-batch


class Recorder:
    """Measures and keeps the per-sample gradients of one micro-batch.

    Args:
        weights: the parameters to watch.
        batch: B, the number of samples.
        directions: `{parameter: [targets, *shape]}` along which per-sample gradients are measured; None measures
            nothing now.
        keep: the parameters whose per-sample gradients are to be kept in `kept`, for a contraction later; beside the
            measurement along `directions`, if there is one.
        rounded: keep them in bfloat16 where they are float32.
        faults: what becomes of an error.
        room: memory for per-sample gradients that are kept.

    Attributes:
        probe: `[groups, targets, B]`, zeros; after the backward pass `probe.grad` holds ⟨g_i, G_n⟩ by group.
        kept: the per-sample gradients of the parameters in `keep`, use by use.
        takes: called with each weight, its factored gradients when the backward pass meets a use, and whose they are:
            long ones come a few samples at a time.
        looking: takes their place, and that of all else, in a backward pass of somebody's own (`look`).
        derived: the weights that were computed in this micro-batch.
        only: the parameters whose `.grad` the backward pass that runs adds to; None for all. The others' gradients are
            not recorded.
        forgets: called where gradients were thrown away that this micro-batch had left in `.grad`.
        inseparable: who takes the gradients of all parameters together, if anybody does.
    """

    def __init__(
        self,
        weights: Weights,
        batch: int,
        directions: Directions | None = None,
        *,
        keep: Collection[Parameter] = (),
        rounded: bool = False,
        faults: Faults | None = None,
        room: Room | None = None,
    ) -> None:
        self.weights, self.batch, self.directions = weights, batch, directions
        self.keep_params, self.rounded = frozenset(keep), rounded
        self.faults, self.room = faults or Faults(), room
        self.kept: list[tuple[Weight, Factors]] = []
        self.takes: list[Callable[[Weight, Factors, slice], None]] = []
        self.looking: Callable[[Weight, Factors], None] | None = None
        self.derived: list[Weight] = []
        self.only: Collection[Parameter] | None = None
        self.forgets: list[Callable[[], None]] = []
        self.inseparable = ""
        self._outside: set[int] = set()
        self._pushed: dict[Weight, dict[int, Tensor]] = {}
        some = next(iter(weights.params))
        targets = number_of(directions) if directions else 1
        dtype = torch.promote_types(some.dtype, torch.float32)
        shape = (weights.number_of_groups, targets, batch)
        self.probe = torch.zeros(shape, dtype=dtype, device=some.device, requires_grad=True)

    def record(self, uses: Sequence[tuple[Weight, Factors]], like: Tensor) -> Tensor:
        """`[groups, targets, B]`: the inner products of these uses; those to be kept are."""
        scores = torch.zeros_like(like)
        for weight, factors in uses:
            if not self.pass_on(weight, factors):
                continue
            if isinstance(self.directions, Held):
                for group, found in products(weight, factors, self.directions).items():
                    scores[group] += found
                continue
            for group, directions in self.directions_of(weight).items():
                scores[group] += factors.dot(directions)
        return scores

    def pass_on(self, weight: Weight, factors: Factors) -> bool:
        """Show a use and keep it; whether it is to be measured as well, which it is not while somebody looks."""
        if self.looking is not None:
            self.looking(weight, factors)
            return False
        if not self.counts(weight):
            return False
        self.hand_on(weight, factors)
        if self.keeps(weight):
            self.keep(weight, factors)
        return True

    @property
    def idle(self) -> bool:
        """Whether the backward pass that runs adds to no `.grad` that is watched: nothing of it is recorded."""
        return self.only is not None and not self.only

    def counts(self, weight: Weight) -> bool:
        """Whether the backward pass that runs adds to the `.grad` of this weight's parameters.

        Raises:
            CoverageError: to that of some, and not to that of others.
        """
        if self.only is None:
            return True
        named = [param for param in weight.params if param in self.only]
        if named and len(named) < len(weight.params):
            names = [self.weights.names[param] for param in weight.params]
            raise CoverageError(
                f"backward(inputs=[...]) names some of {', '.join(names)}, of which one weight is computed, and not "
                "the others, so that the per-sample gradients of those cannot be told apart; pass all of them."
            )
        return bool(named)

    @contextmanager
    def recording(self, only: Collection[Parameter] | None) -> Iterator[None]:
        """Around a backward pass that adds to the `.grad` of these parameters; None for all."""
        before, self.only = self.only, only
        try:
            yield
        finally:
            self.only = before

    def forget(self) -> None:
        """What was recorded so far stands in no `.grad` any more."""
        self.kept.clear()
        self.probe.grad = None
        for forget in self.forgets:
            forget()

    def keeps(self, weight: Weight) -> bool:
        """Whether the per-sample gradients of this weight wait for a later contraction."""
        return not self.keep_params.isdisjoint(weight.params)

    def keep(self, weight: Weight, factors: Factors) -> None:
        """Keep the per-sample gradients of one use."""
        self.kept.append((weight, rounded(factors) if self.rounded else factors))

    def hand_on(self, weight: Weight, factors: Factors, part: slice = WHOLE) -> None:
        """Show a use, or that of some samples, to those who take the factored gradients as they come."""
        for take in self.takes:
            take(weight, factors, part)

    def directions_of(self, weight: Weight) -> dict[int, Tensor]:
        """`{group: [targets, *weight.shape]}`: the directions pushed through to this weight; once per weight.

        What is held in another form is written out for each use and not kept.
        """
        if self.directions is None:
            return {}
        if isinstance(self.directions, Held):
            return weight.push(self.directions)
        if weight not in self._pushed:
            self._pushed[weight] = weight.push(self.directions)
        return self._pushed[weight]

    def products_by_pairs(self, weight: Weight, factors: Factors) -> dict[int, Tensor] | None:
        """`{group: [targets, B]}` without writing a direction out; None where that takes longer."""
        return through_pairs(weight, factors, self.directions, rides=True)

    def look(self, y: Tensor, gradient: Tensor, take: Callable[[Weight, Factors], None]) -> None:
        """Run backward from `y` with another gradient, the graph kept; `take` alone gets the factored gradients."""
        self.looking = take
        try:
            torch.autograd.grad(y, self.probe, gradient, retain_graph=True, allow_unused=True)
        finally:
            self.looking = None

    def came_from_outside(self, tensor: Tensor) -> None:
        """A tensor of the user's: its memory may be written to as soon as the micro-batch is over."""
        if (
            tensor.grad_fn is None
        ):  # with a history it was computed by somebody, and an activation is not copied
            with suppress(
                NotImplementedError, RuntimeError
            ):  # a sparse or distributed tensor has no memory of its own
                self._outside.add(tensor.untyped_storage().data_ptr())
            self._outside.discard(0)  # that of all empty tensors

    def owned(self, factors: Factors) -> Factors:
        """The same in memory that does not belong to the user."""
        return apart_from(factors, self._outside)

    def own_kept(self, gradients: Iterable[Tensor]) -> None:
        """After the backward pass: what is kept shares no memory with the parameters' gradients, nor the user's."""
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients} | self._outside
        self.kept = [(weight, apart_from(factors, storages)) for weight, factors in self.kept]
        if self.keep_params or self.takes:
            for weight in self.derived:
                weight.operands[:] = [own_memory(x, self._outside) for x in weight.operands]
                weight.rows = None if weight.rows is None else own_memory(weight.rows, self._outside)

    def release(self) -> list[tuple[Weight, Factors]]:
        """Hand over what was kept; the capture itself may live on, in cycles, until garbage is collected."""
        kept, self.kept, self.directions, self._pushed, self.derived = self.kept, [], None, {}, []
        return kept

    def fault(self, where: str, error: Exception) -> None:
        """An error in following a call or its gradient.

        Where it is not raised, what follows is watched as before: a checkpointed part that runs again must save the
        same tensors as it did the first time.
        """
        self.faults.note(where, error)
