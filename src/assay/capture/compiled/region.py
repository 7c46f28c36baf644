"""One graph that Dynamo traced, compiled together with what the capture makes of it.

How a graph is captured depends on what is known of its inputs (which are weights, where the samples are) and on what
is asked for (directions, what is kept). Each such variant is planned on fake tensors and compiled by the user's own
compiler the first time it is met, and used again ever after.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module, Parameter

from assay.capture.compiled.reasons import CannotCompileError
from assay.capture.compiled.slots import Form, Receive, Slot, taken_apart
from assay.capture.compiled.trace import Again, Setting, TracedCapture, follow_graph
from assay.capture.held import Held
from assay.capture.marks import Data, Mark, Weight
from assay.capture.mode import Capture
from assay.errors import CoverageError

__all__ = ["Region"]

Compiler = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Any]]


@dataclass(frozen=True)
class _Plan:
    """What following a graph on fake tensors says.

    Args:
        tensors: positions of the tensors among the graph's inputs.
        measured: positions of the weights whose directions are inputs.
        forms: what is kept, use by use in the order of the forward pass.
        marks: of the outputs, None for what is no tensor.
        constants: the outputs that are no tensors.
        again: makes the weights of `forms` that are not inputs.
        notes: positions of the weights of each use, operation and rule.
        uses: how many there are.
        complete: whether the factors of all weights leave the graph.
    """

    tensors: tuple[int, ...]
    measured: tuple[int, ...]
    forms: tuple[tuple[Form, ...], ...]
    marks: tuple[Mark | None, ...]
    constants: tuple[Any, ...]
    again: Again
    notes: tuple[tuple[tuple[int, ...], str, str], ...]
    uses: int
    complete: bool

    @property
    def slots(self) -> list[Slot]:
        """All slots in order."""
        return [slot for forms in self.forms for form in forms for slot in form.slots]

    @property
    def weights(self) -> set[int]:
        """Positions of the weights that are used."""
        return {k for positions, _, _ in self.notes for k in positions}


class Region:
    """Stands for a compiled graph: Dynamo calls it with the graph's inputs.

    Args:
        graph: what Dynamo traced, in torch functions; parameters are among its inputs.
        compiler: the user's own.
        current: gives the capture of the step that runs.
    """

    def __init__(self, graph: GraphModule, compiler: Compiler, current: Callable[[], Capture]) -> None:
        self._graph, self._compiler, self._current = graph, compiler, current
        self._variants: dict[Hashable, tuple[_Plan, Callable[..., Any]]] = {}

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """The graph's outputs.

        Raises:
            CannotCompileError: this graph cannot be captured in compiled form; nothing has run.
        """
        capture = self._current()
        marks = [capture.mark_of(x) if isinstance(x, Tensor) else None for x in inputs]
        key = _key(capture, inputs, marks)
        if key not in self._variants:
            devices = [capture.probe.device] if capture.probe.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                self._variants[key] = self._variant(capture, inputs, marks)
        plan, function = self._variants[key]
        return _run(plan, function, capture, inputs)

    def _variant(
        self, capture: Capture, inputs: Sequence[Any], marks: Sequence[Mark | None]
    ) -> tuple[_Plan, Callable[..., Any]]:
        setting = _setting(capture, marks)
        try:
            plan = _planned(self._graph, setting, capture, inputs)
            retained = torch._functorch.config.patch(donated_buffer=False) if capture.takes else nullcontext()
            with retained:  # whoever takes factors may go through the graph more than once
                function = self._compiler(*_wrapped(self._graph, plan, setting, capture, inputs))
        except (CoverageError, CannotCompileError):
            raise
        except Exception as error:  # whatever a compiler has to say
            reason = str(error).strip().split("\n")[0]
            raise CannotCompileError(f"{type(error).__name__}: {reason}") from error
        return plan, function


def _key(capture: Capture, inputs: Sequence[Any], marks: Sequence[Mark | None]) -> Hashable:
    """What a variant depends on."""
    parts: list[Hashable] = [
        capture.batch,
        tuple(capture.probe.shape),
        capture.directions is None,
        capture.strict,
        capture.by_token,
        torch.is_grad_enabled(),
    ]
    for x, mark in zip(inputs, marks, strict=True):
        if mark is None:
            parts.append((type(x), x))
        elif isinstance(mark, Weight):
            if capture.weights.marks.get(id(x)) is not mark:
                raise CannotCompileError("a weight that was computed outside of it enters it")
            (param,) = mark.params
            parts.append((tuple(x.shape), capture.weights.groups[param], _wanted(capture, mark)))
        elif isinstance(mark, Data):
            if not _regular(mark):
                raise CannotCompileError("rows in an order of their own enter it")
            where = [at and (at.dim, at.batch, at.inner) for at in (mark.layout, mark.tokens)]
            parts.append((tuple(x.shape), *where))
        else:
            parts.append((tuple(x.shape), "constant"))
    return tuple(parts)


def _regular(mark: Data) -> bool:
    """Whether it takes no tensor to say which rows are whose."""
    return all(layout is None or layout.labels is None for layout in (mark.layout, mark.tokens))


def _wanted(capture: Capture, weight: Weight) -> bool:
    """Whether the factors of this weight must leave the graph."""
    return capture.keeps(weight) or bool(capture.takes)


def _setting(capture: Capture, marks: Sequence[Mark | None]) -> Setting:
    leaves = {k: mark for k, mark in enumerate(marks) if isinstance(mark, Weight)}
    others = {k: mark for k, mark in enumerate(marks) if mark is not None and not isinstance(mark, Weight)}
    keep = frozenset(mark.params[0] for mark in leaves.values() if _wanted(capture, mark))
    return Setting(capture.weights, leaves, others, capture.batch, keep, capture.strict, capture.by_token)


def _planned(graph: GraphModule, setting: Setting, capture: Capture, inputs: Sequence[Any]) -> _Plan:
    """Follow the graph forward and backward on fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    measured = tuple(setting.leaves) if capture.directions is not None else ()
    tensors = tuple(k for k, x in enumerate(inputs) if isinstance(x, Tensor))
    with mode, _no_saved_tensors_hooks():
        fakes = [_fake(mode, x) for x in inputs]
        probe = _fake(mode, capture.probe)
        directions = {_param(setting, k): _fake(mode, d) for k, d in _directions(capture, inputs, measured)}
        traced = TracedCapture(setting, fakes, probe, directions or None)
        outs = follow_graph(graph, traced, fakes)
        marks = tuple(traced.mark_of(x) if isinstance(x, Tensor) else None for x in outs)
        ends = [x for x in outs if isinstance(x, Tensor) and x.requires_grad]
        if ends and traced.found:
            seeds = [torch.ones_like(x) for x in ends]
            torch.autograd.grad(ends, [probe], seeds, allow_unused=True)
    for mark in marks:
        if isinstance(mark, Weight):
            raise CannotCompileError("it returns a weight that it computed")
        if isinstance(mark, Data) and not _regular(mark):
            raise CannotCompileError("it returns rows in an order of their own")
    position = {mark.params[0]: k for k, mark in setting.leaves.items()}
    forms = tuple(
        tuple(_form(traced.made.get(weight, position[weight.params[0]]), factors) for weight, factors in use)
        for use in traced.found
    )
    again = Again(graph, [form.weight for use in forms for form in use if isinstance(form.weight, Node)])
    notes = tuple(
        (tuple(position[p] for p in params), operation, rule)
        for params, operation, rule in traced.notes.entries
    )
    constants = tuple(None if isinstance(x, Tensor) else x for x in outs)
    complete = len(setting.keep) == len(setting.leaves)
    return _Plan(tensors, measured, forms, marks, constants, again, notes, traced.uses, complete)


@contextmanager
def _no_saved_tensors_hooks() -> Iterator[None]:
    """Those of a checkpoint around the compiled part would run its forward pass again."""
    state: Any = torch._C._autograd
    hooks = []
    while (top := state._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        state._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            state._push_saved_tensors_default_hooks(pack, unpack)


def _form(weight: int | Node, factors: Any) -> Form:
    tensors, build = taken_apart(factors)
    return Form(weight, tuple(Slot.of(t) for t in tensors), build)


def _fake(mode: FakeTensorMode, x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    fake = mode.from_tensor(x, static_shapes=True)
    return fake if fake.is_leaf else fake.detach().requires_grad_(x.requires_grad)


def _param(setting: Setting, position: int) -> Parameter:
    return setting.leaves[position].params[0]


def _directions(
    capture: Capture, inputs: Sequence[Any], positions: Sequence[int]
) -> list[tuple[int, Tensor]]:
    """The directions of the weights at these positions; a compiler relies on their strides."""
    if capture.directions is None:
        return []
    marks, held = capture.weights.marks, capture.directions
    read = held.stored if isinstance(held, Held) else held.__getitem__
    return [(k, read(marks[id(inputs[k])].params[0]).contiguous()) for k in positions]


def _wrapped(
    graph: GraphModule, plan: _Plan, setting: Setting, capture: Capture, inputs: Sequence[Any]
) -> tuple[GraphModule, list[Tensor]]:
    """A graph of one call, which follows the real one wherever it is traced, and example inputs."""
    directions = [d for _, d in _directions(capture, inputs, plan.measured)]
    slots = [slot.empty(capture.probe.device).requires_grad_() for slot in plan.slots]
    examples = [*(inputs[k] for k in plan.tensors), capture.probe, *directions, *slots]
    outer = Graph()
    places = tuple(outer.placeholder(f"input_{k}") for k in range(len(examples)))
    constants = [None if isinstance(x, Tensor) else x for x in inputs]

    def followed(*tensors: Tensor) -> list[Tensor]:
        return _traced(graph, plan, setting, constants, tensors)

    out = outer.call_function(followed, places)
    wanted = [k for k, mark in enumerate(plan.marks) if mark is not None]
    outer.output(tuple(outer.call_function(operator.getitem, (out, k)) for k in range(len(wanted))))
    return GraphModule(Module(), outer), examples


def _traced(
    graph: GraphModule, plan: _Plan, setting: Setting, constants: Sequence[Any], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """What the user's compiler traces."""
    inputs = list(constants)
    for k, x in zip(plan.tensors, tensors, strict=False):
        inputs[k] = x
    probe, *rest = tensors[len(plan.tensors) :]
    directions = {_param(setting, k): d for k, d in zip(plan.measured, rest, strict=False)}
    remaining = iter(rest[len(plan.measured) :])
    slots = [[next(remaining) for form in forms for _ in form.slots] for forms in plan.forms]
    traced = TracedCapture(setting, inputs, probe, directions or None, slots)
    return [x for x in follow_graph(graph, traced, inputs) if isinstance(x, Tensor)]


def _run(
    plan: _Plan, function: Callable[..., Any], capture: Capture, inputs: Sequence[Any]
) -> tuple[Any, ...]:
    """One call: scores come with the probe's gradient, what is kept with that of the slots."""
    capture.inseparable = "a compiled part of the model"
    marks = capture.weights.marks
    weights: dict[int | Node, Weight] = {k: marks[id(inputs[k])] for k in plan.weights}
    weights |= plan.again.marks(capture, inputs)
    slots: tuple[Tensor, ...] = ()
    if plan.slots and torch.is_grad_enabled():
        sink = partial(_kept, plan, capture, weights)
        slots = Receive.apply(capture.probe, plan.slots, sink, capture.faults)  # type: ignore[no-untyped-call]
    directions = [d for _, d in _directions(capture, inputs, plan.measured)]
    found = iter(function(*(inputs[k] for k in plan.tensors), capture.probe, *directions, *slots))
    outs = []
    for mark, constant in zip(plan.marks, plan.constants, strict=True):
        out = constant if mark is None else next(found)
        if mark is not None:
            capture._set(out, mark)
        outs.append(out)
    _unseen_backward(plan, capture, outs)
    capture.uses += plan.uses
    for positions, operation, rule in plan.notes:
        params = [weights[k].params[0] for k in positions]
        capture.coverage.note(params, operation, rule, capture.probe)
    return tuple(outs)


def _kept(
    plan: _Plan,
    capture: Capture,
    weights: Mapping[int | Node, Weight],
    gradients: Sequence[Tensor | None],
) -> None:
    """What came back for the slots of one call."""
    remaining = iter(gradients)
    for form in (form for forms in plan.forms for form in forms):
        tensors = [next(remaining) for _ in form.slots]
        present = [t for t in tensors if t is not None]
        if len(present) < len(tensors):
            continue  # nothing came back for this use
        capture.pass_on(weights[form.weight], form.factors(present))  # measured inside the graph already


def _unseen_backward(plan: _Plan, capture: Capture, outs: Sequence[Any]) -> None:
    """The compiled backward pass runs unseen: its operations are no longer those of the model."""
    nodes = {x.grad_fn for x in outs if isinstance(x, Tensor) and x.grad_fn is not None}
    for node in nodes:
        opened: list[bool] = []

        def before(_: Any, opened: list[bool] = opened) -> None:
            if capture.looking is not None and not plan.complete:
                raise RuntimeError("another backward pass through a compiled graph that hands no factors out")
            opened.append(capture.in_compiled_backward)
            capture.in_compiled_backward = True

        def after(_: Any, __: Any, opened: list[bool] = opened) -> None:
            capture.in_compiled_backward = opened.pop()

        node.register_prehook(before)
        node.register_hook(after)
