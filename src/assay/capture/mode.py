"""The capture: sees every torch function of a training step and watches those that bring weights and samples together.

While it is active, each call is sorted by what its operands are:

* no weight: run it, and follow where the samples go (`track`);
* weights but no sample: run it; the result is a weight again, with its own derivative (`marks.derive`);
* both: a use. The rule of the operation (`operations`) runs the call and reads, in the backward pass, the weights'
  per-sample gradients from the gradient of the output (`probe`, `factors`).

A use for which no exact rule exists is refused by name. Nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _StopRecomputationError

from assay.capture.accumulated import Accumulated
from assay.capture.backward import BACKWARD, BackwardPass
from assay.capture.call import (
    GENERAL,
    RULES,
    Call,
    input_first,
    name_of,
    operands,
    tensors_of,
    writes_in_place,
)
from assay.capture.coverage import Coverage
from assay.capture.layout import Layout
from assay.capture.marks import (
    CONSTANT,
    LINEAR,
    MIXED,
    Data,
    Directions,
    Mark,
    Weight,
    derive,
    rows_looked_up,
)
from assay.capture.probe import Explain, Observe, ObserveInPlace, Use
from assay.capture.recorder import Recorder
from assay.capture.room import Room
from assay.capture.tokens import ByToken, positions_in
from assay.capture.track import follow
from assay.capture.track.tokens import follow_tokens
from assay.capture.weights import Weights
from assay.errors import CoverageError, InputError
from assay.faults import Faults

__all__ = ["Capture"]


class Capture(Recorder, TorchFunctionMode):
    """Watches one micro-batch: active from before the forward pass until after the backward pass.

    Args:
        weights: the parameters to watch.
        batch: B, the number of samples.
        directions: along which per-sample gradients are measured, and `keep`, `rounded`, `faults` and `room`: as
            `Recorder` has them. An error in following the calls is a fault as well.
        strict: leave torch's own weight gradients untouched, bit for bit.
        by_token: follow the positions of the sequences, so that what is kept can be taken apart by token (`tokens`).
        coverage: where uses are noted.
        refused: collects parameters with uses that no rule follows, and why; None raises at the first.

    Attributes:
        uses: how many there were, those in the backward pass (checkpoints) not counted again.
        paused: while true, calls pass unseen.
        in_compiled_backward: while true, only calls with gradients are seen: a checkpoint that runs its forward pass
            again.
        before_backward: called when the first backward pass begins that adds to the weights' gradients.
        positions: T of the longest sequence that entered the model, where tokens are followed.
    """

    def __init__(
        self,
        weights: Weights,
        batch: int,
        directions: Directions | None = None,
        *,
        keep: Collection[Parameter] = (),
        rounded: bool = False,
        strict: bool = False,
        by_token: bool = False,
        faults: Faults | None = None,
        coverage: Coverage | None = None,
        refused: dict[Parameter, str] | None = None,
        room: Room | None = None,
    ) -> None:
        TorchFunctionMode.__init__(self)
        Recorder.__init__(
            self, weights, batch, directions, keep=keep, rounded=rounded, faults=faults, room=room
        )
        self.strict, self.refused = strict, refused
        self.coverage = coverage if coverage is not None else Coverage(weights.names)
        self.by_token, self.positions = by_token, 0
        self.uses = 0
        self.paused = self.in_compiled_backward = False
        self._token = object()
        # shapes of what was taken for samples by its rows alone
        self._by_rows: dict[tuple[int, ...], None] = {}
        self._marked: list[ref[Tensor]] = []
        self._accumulated = Accumulated(weights.params)
        self.before_backward: Callable[[], object] = _nothing

    # --- every call ---

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, seen as the module's text says."""
        kwargs = kwargs or {}
        if (
            func in _SAYS_NOTHING
            or self.paused
            or (self.in_compiled_backward and not torch.is_grad_enabled())
        ):
            return func(*args, **kwargs)
        if func in BACKWARD:
            return self._run_backward(BackwardPass.of(func, args, kwargs))
        if not self.faults.detaches:
            return self._follow(func, args, kwargs)
        written = (
            args[0] if args and isinstance(args[0], Tensor) and writes_in_place(func, args, kwargs) else None
        )
        version = None if written is None else written._version
        try:
            return self._follow(func, args, kwargs)
        except _StopRecomputationError:
            raise  # no error: a checkpointed part has all that it was run again for
        except Exception as error:
            if written is not None and written._version != version:  # done before it failed
                out: Any = None if name_of(func) == "__setitem__" else written
            else:
                out = func(*args, **kwargs)  # where the call itself was wrong, this raises its error
            self.fault("in the forward pass", error)
            return out

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `func` and mark its result."""
        args, kwargs = input_first(args, kwargs)
        tensors = tensors_of(args, kwargs)
        marks = [self.mark_of(t) for t in tensors]
        if not torch.is_grad_enabled():
            marks = [CONSTANT if isinstance(mark, Weight) else mark for mark in marks]
        weighs = any(isinstance(mark, Weight) for mark in marks)
        if weighs:
            # a number that comes from all samples (which expert, how many) is a constant to a weight
            marks = [
                CONSTANT
                if isinstance(mark, Data) and mark.layout is None and not t.is_floating_point()
                else mark
                for t, mark in zip(tensors, marks, strict=True)
            ]
            if any(isinstance(mark, Data) for mark in marks):
                return self._use(func, args, kwargs)
        name = name_of(func)
        if weighs and writes_in_place(func, args, kwargs):
            # as it was: a derivative may be asked for later
            tensors = [tensors[0].detach().clone(), *tensors[1:]]
        out = func(*args, **kwargs)
        with self.faults.caught("in the forward pass"):  # of what has been run: it is not run again
            if name == "__setitem__":
                self._set(args[0], self._mark_result(func, args, kwargs, tensors, marks, args[0], 0, None))
            if isinstance(out, Tensor):
                self._set(out, self._mark_result(func, args, kwargs, tensors, marks, out, 0, None))
            elif isinstance(out, (tuple, list)):
                for position, part in enumerate(out):
                    if isinstance(part, Tensor):
                        mark = self._mark_result(func, args, kwargs, tensors, marks, part, position, out)
                        self._set(part, mark)
        return out

    def _run_backward(self, asked: BackwardPass) -> Any:
        """Run a backward pass; what it adds to the watched `.grad` is recorded, and nothing else is."""
        inside = torch._C._current_graph_task_id() != -1
        part = inside and asked.accumulates and not asked.leaves  # of the pass that runs: a checkpoint's
        if part or any(leaf is self.probe for leaf in asked.leaves):
            return asked.run(self.probe, under=self)
        only: Collection[Parameter] | None = None if asked.accumulates else ()
        with self.faults.caught("before a backward pass"):
            only = self._named(asked) if asked.accumulates and asked.leaves else only
            if (only is None or only) and not inside:
                if self._accumulated.empty:
                    self.before_backward()
                if self._accumulated.gone():
                    self.forget()
        with self.recording(only):
            found = asked.run(None if self.idle else self.probe, under=self)
            if not self.idle and not inside:
                self._accumulated.note()
        return found

    def _named(self, asked: BackwardPass) -> Collection[Parameter] | None:
        """The watched parameters among the leaves of a backward pass; None for all of them."""
        weights = self.weights
        watched = {id(x): p for p in weights.params for x in (p, weights.used(p))}
        named = {watched[id(leaf)] for leaf in asked.leaves if id(leaf) in watched}
        others = [name for p, name in weights.names.items() if p not in named]
        if named and others and self.inseparable:
            raise InputError(
                f"backward(inputs=[...]) inside run.step leaves out {', '.join(others[:3])}"
                f"{' …' if len(others) > 3 else ''} and names other parameters, and {self.inseparable} cannot take "
                "them apart; name all that the run watches, or pass exclude=[...] with the names of the others."
            )
        return named if others else None

    def _use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(self, func, name_of(func), args, kwargs)
        out = NotImplemented
        for rule in (RULES.get(func), *GENERAL):
            if rule is not None and (out := rule(call)) is not NotImplemented:
                break
        if isinstance(out, Tensor) and not isinstance(self._known(out), Data):
            self._set(out, Data(self.layout_of(call, out), self._tokens_of(call, out)))
        return None if call.name == "__setitem__" else out

    def _mark_result(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        marks: list[Mark],
        out: Tensor,
        position: int,
        parts: Sequence[Any] | None,
    ) -> Mark:
        data = [(t, m.layout) for t, m in zip(tensors, marks, strict=True) if isinstance(m, Data)]
        if data and not name_of(func).startswith(_CREATES):
            if self.batch == 1:
                layout = Layout(0, 1, inner=out.shape[0]) if out.dim() else None
            else:
                layout = follow(name_of(func), data, args, kwargs, out, position)
            if layout is None:
                return MIXED
            placed = self._placed(zip(tensors, marks, strict=True))
            return Data(
                layout, follow_tokens(name_of(func), placed, args, kwargs, out, position) if placed else None
            )
        weights = {i: mark for i, mark in enumerate(marks) if isinstance(mark, Weight)}
        if not weights or not out.requires_grad:
            return CONSTANT
        _, rebuild = operands(args, kwargs)

        in_place = writes_in_place(func, args, kwargs)

        def again(*values: Tensor) -> Tensor:
            first = values[0].clone() if in_place else values[0]
            new_args, new_kwargs = rebuild([first, *values[1:]])
            result = func(*new_args, **new_kwargs)
            return first if in_place else result if parts is None else result[position]

        linear = name_of(func) in LINEAR and len(weights) == 1 and not in_place and parts is None
        mark = derive(again, tensors, weights, linear and kwargs.get("max_norm") is None)
        mark.rows = rows_looked_up(func, args, kwargs, weights)
        self.derived.append(mark)
        return mark

    # --- what is known of a tensor ---

    def mark_of(self, tensor: Tensor) -> Mark:
        """What is known of a tensor; one from outside of the step carries samples if its rows say so (`outside`)."""
        known = self._known(tensor)
        if known is not None:
            return known
        weight = self.weights.marks.get(id(tensor))
        if weight is not None:
            return weight if tensor.requires_grad else CONSTANT  # frozen since the run began
        if isinstance(tensor, Parameter) or id(tensor) in self.weights.constants:
            return CONSTANT
        self.came_from_outside(tensor)
        if self.batch == 1:
            return Data(Layout(0, 1, inner=tensor.shape[0])) if tensor.dim() else CONSTANT
        if self.weights.outside.carries(tensor, self.batch):
            if tensor.is_floating_point():  # no index, no labels
                self._by_rows[tuple(tensor.shape)] = None
            return Data(Layout(0, self.batch))
        return CONSTANT

    def enter(self, tensor: Tensor) -> None:
        """An input of the model: its rows are the samples, also where the caller made it inside the step."""
        known = self._known(tensor)
        positions = positions_in(tensor) if self.by_token else 0
        fresh = known is None or known is CONSTANT
        if fresh:
            self.came_from_outside(tensor)
        if fresh and self.batch > 1 and not self.weights.outside.carries(tensor, self.batch):
            if self.weights.outside.is_constant(tensor):
                self._set(tensor, CONSTANT)  # holds of copies as well
            return
        if (fresh or positions) and tensor.dim() and tensor.shape[0] == self.batch:
            tokens = Layout(1, positions) if positions else None
            layout = known.layout if isinstance(known, Data) else Layout(0, self.batch)
            self._set(tensor, Data(layout, tokens))
            self.positions = max(self.positions, positions)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Calls pass unseen inside."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def carry_over(self, before: Any, after: Any) -> None:
        """What is known of tensors holds of their copies, made where no call was seen (a custom Function)."""
        for x, y in zip(tree_leaves(before), tree_leaves(after), strict=False):
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x is not y and x.shape == y.shape:
                known = self._known(x)
                if known is not None and self._known(y) is None:
                    self._set(y, known)

    def _known(self, tensor: Tensor) -> Mark | None:
        tagged = getattr(tensor, "_assay", None)
        return tagged[1] if tagged is not None and tagged[0] is self._token else None

    def _set(self, tensor: Tensor, mark: Mark) -> None:
        if id(tensor) not in self.weights.marks:
            tensor._assay = (self._token, mark)  # type: ignore[attr-defined]
            self._marked.append(ref(tensor))

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Around all that the capture sees: afterwards nothing of assay's stays on the tensors that are still there.

        They are the user's, who may save them.
        """
        try:
            yield
        finally:
            for weak in self._marked:
                tensor = weak()
                if tensor is not None:
                    # as torch's own weak references do: autograd alone may have held it
                    fix = getattr(tensor, "_fix_weakref", None)
                    if fix is not None:
                        fix()
                    tensor.__dict__.pop("_assay", None)
            self._marked.clear()

    def rows_as(self, x: Tensor, other: Tensor) -> Tensor:
        """`x`, which carries no sample, with its rows given to the samples of another tensor's rows."""
        if isinstance(self.mark_of(x), Data):
            return x
        rows = torch.zeros_like(x)
        self._set(rows, self.mark_of(other))
        return x + rows

    def layout_of(self, call: Call, out: Tensor) -> Layout | None:
        """Where the samples are in the result of a call."""
        if self.batch == 1:
            return Layout(0, 1, inner=out.shape[0]) if out.dim() else None
        tensors = tensors_of(call.args, call.kwargs)
        data = [(t, mark.layout) for t in tensors if isinstance(mark := self.mark_of(t), Data)]
        return follow(call.name, data, call.args, call.kwargs, out)

    def _placed(self, operands: Iterable[tuple[Tensor, Mark]]) -> list[tuple[Tensor, Layout]]:
        """The operands in which the positions of the sequences are known."""
        if not self.by_token:
            return []
        return [(t, m.tokens) for t, m in operands if isinstance(m, Data) and m.tokens is not None]

    def _tokens_of(self, call: Call, out: Tensor) -> Layout | None:
        """Where the positions of the sequences are in the result of a use."""
        if not self.by_token:
            return None
        tensors = tensors_of(call.args, call.kwargs)
        placed = self._placed((t, self.mark_of(t)) for t in tensors)
        return follow_tokens(call.name, placed, call.args, call.kwargs, out) if placed else None

    def layout_by_shape(self, call: Call) -> Layout | None:
        """`layout_of` for an elementwise call of two operands, before its result exists."""
        pair = [t for t in call.args[:2] if isinstance(t, Tensor)]
        layouts = [
            (t, m.layout) for t in pair if isinstance(m := self.mark_of(t), Data) and m.layout is not None
        ]
        if len(layouts) != 1:
            return None
        (x, layout) = layouts[0]
        other = max((t.dim() for t in pair), default=0)
        return layout.at(layout.dim + max(other - x.dim(), 0))

    # --- uses ---

    def observe(
        self, call: Call, y: Tensor, explain: Explain, saved: Sequence[Tensor], layout: Layout | None = None
    ) -> Tensor:
        """`y` under a node that reads its gradient; see `Call.observe`."""
        layout = layout or self.layout_of(call, y)
        watch = ObserveInPlace if call.in_place else Observe
        tensors = tensors_of(call.args, call.kwargs)
        weights = tuple(mark for t in tensors if isinstance(mark := self.mark_of(t), Weight))
        explain = self._by_token(explain, self._tokens_of(call, y)) if self.by_token else explain
        if y.requires_grad:
            y = watch.apply(y, self.probe, Use(self, explain), *saved)  # type: ignore[no-untyped-call]
        return self.note(call, weights, y, layout, call.name)

    def note(
        self, call: Call, weights: Iterable[Weight | None], y: Tensor, layout: Layout | None, rule: str
    ) -> Tensor:
        """Mark the result of a use, and enter the use in the coverage."""
        if (
            torch._C._current_graph_task_id() == -1
        ):  # a checkpoint's forward pass in the backward pass is no new use
            self.uses += 1
        with self.faults.caught("in the forward pass"):
            for weight in weights:
                if weight is not None:
                    self.coverage.note(weight.params, call.name, rule, y)
            self._set(y, MIXED if layout is None else Data(layout, self._tokens_of(call, y)))
        return y

    @staticmethod
    def _by_token(explain: Explain, tokens: Layout | None) -> Explain:
        return lambda gy, saved: [(weight, ByToken(f, tokens)) for weight, f in explain(gy, saved)]

    def refuse(self, call: Call, weights: Iterable[Weight], reason: str) -> None:
        """Note, or raise an error that names, the parameters of a use that cannot be followed."""
        params = list(dict.fromkeys(p for weight in weights for p in weight.params))
        if self.refused is not None:
            for param in params:
                self.refused.setdefault(param, f"`{call.name}`: {reason}")
            return
        names = [self.weights.names[p] for p in params]
        raise CoverageError(
            f"parameter {', '.join(names)} meets the samples in `{call.name}`, whose per-sample gradients cannot be "
            f"formed: {reason}. Pass exclude={names} to leave it out of the scores (they are then partial), or "
            f"rewrite the operation.{self._guessed()}"
        )

    def _guessed(self) -> str:
        """What a refusal says of tensors that may be no samples."""
        if not self._by_rows:
            return ""
        shapes = " and ".join(str(list(shape)) for shape in list(self._by_rows)[:3])
        return (
            f" What came from outside of the step with the shape {shapes} was taken for samples by its rows; if it is "
            "constant, make it a buffer before Run()."
        )

    def names_of(self, weight: Weight | None) -> str:
        """The names of the parameters behind a weight."""
        return ", ".join(self.weights.names[param] for param in weight.params) if weight is not None else "?"


def _nothing() -> None:
    pass


# calls that return no tensor and change none, of which a model makes as many as of all others
_SAYS_NOTHING = frozenset(
    {
        torch._C._set_grad_enabled,
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        Tensor.stride,
        Tensor.is_floating_point,
    }
    | {
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")
    }
)
# functions that take of the samples at most how many there are
_CREATES = ("new_", "zeros", "ones", "full", "empty", "arange", "linspace", "eye")
