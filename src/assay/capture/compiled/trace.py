"""The capture inside a compiler's trace.

Dynamo hands over a graph of torch functions. While AOTAutograd traces it, the graph is interpreted under a capture
whose weights, probe and directions are the tracer's own tensors: every rule of `operations` runs as it does eagerly,
and the joint graph that comes of it holds the per-sample contractions beside the model's own backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import Parameter

from assay.capture.compiled.reasons import CannotCompileError
from assay.capture.compiled.slots import Deliver, taken_apart
from assay.capture.contraction import cost_model
from assay.capture.coverage import Coverage
from assay.capture.factors import Dense, Factors, Outer
from assay.capture.marks import Directions, Mark, Weight
from assay.capture.mode import Capture
from assay.capture.weights import Weights

__all__ = ["Again", "Notes", "Setting", "TracedCapture", "follow_graph"]


@dataclass(frozen=True)
class Setting:
    """What a graph is followed for.

    Args:
        weights: all watched parameters.
        leaves: the marks of those that enter the graph, by position among its inputs.
        others: the marks of its other tensor inputs, likewise.
        batch: B.
        keep: the parameters whose per-sample gradients are kept.
        strict: leave torch's own weight gradients untouched.
        by_token: follow the positions of the sequences as well.
    """

    weights: Weights
    leaves: Mapping[int, Weight]
    others: Mapping[int, Mark]
    batch: int
    keep: Collection[Parameter]
    strict: bool
    by_token: bool


class Notes(Coverage):
    """Collects the uses of one interpretation, to be entered in the real coverage at every call."""

    def __init__(self) -> None:
        super().__init__({})
        self.entries: list[tuple[tuple[Parameter, ...], str, str]] = []

    def note(self, params: Iterable[Parameter], operation: str, rule: str, y: Tensor) -> None:
        """Enter one use."""
        self.entries.append((tuple(params), operation, rule))


class TracedCapture(Capture):
    """A capture over a tracer's tensors; what it keeps leaves through slots.

    Args:
        setting: what to follow.
        inputs: the graph's inputs as the tracer has them.
        probe: `[groups, targets, B]`.
        directions: `{parameter: [targets, *shape]}` or None.
        slots: for each use in the order of the forward pass, the slots of what it keeps; None while that is not
            known yet, and is to be found in `found`.

    Attributes:
        planning: whether the slots are still to be found.
        found: by use, what it kept.
        made: the node of the graph that made a weight from others.
    """

    def __init__(
        self,
        setting: Setting,
        inputs: Sequence[Any],
        probe: Tensor,
        directions: Directions | None,
        slots: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        self._slots, self.planning = slots, slots is None
        self.found: list[list[tuple[Weight, Factors]]] = []
        self.made: dict[Weight, Node] = {}
        self._fresh: list[tuple[Weight, Factors]] = []  # of the use whose backward pass runs now
        self._made = False
        notes = Notes()
        super().__init__(
            setting.weights,
            setting.batch,
            directions,
            keep=setting.keep,
            strict=setting.strict,
            by_token=setting.by_token,
            coverage=notes,
        )
        self.notes = notes
        self.probe, self._made = probe, True
        self.weights = copy.copy(setting.weights)
        self.weights.marks = {id(inputs[position]): mark for position, mark in setting.leaves.items()}
        for position, mark in setting.others.items():
            self._set(inputs[position], mark)

    @property
    def probe(self) -> Tensor:
        """A probe of its own for each use, through which what it keeps finds its slots."""
        if not self._made:
            return self._probe
        use = len(self.found)
        self.found.append([])
        slots = self._slots[use] if self._slots else ()
        with torch._C.DisableTorchFunction():
            return Deliver.apply(self._probe, lambda: self._taken(use), *slots)  # type: ignore[no-any-return, no-untyped-call]

    @probe.setter
    def probe(self, value: Tensor) -> None:
        self._probe = value

    def came_from_outside(self, tensor: Tensor) -> None:
        """A tracer's tensors have no memory."""

    def keep(self, weight: Weight, factors: Factors) -> None:
        """What the use keeps whose backward pass runs now.

        A weight that was made inside a rule or a checkpoint, not by a node of the graph, cannot be made again outside:
        its gradients go back to its parameters at once.
        """
        leaves = {mark.params[0]: mark for mark in self.weights.marks.values()}
        if weight in self.made or leaves.get(weight.params[0]) is weight:
            self._fresh.append((weight, factors))
            return
        assert weight.pull is not None
        pulled = weight.pull(_written_out(weight, factors))
        self._fresh += [(leaves[param], Dense(g)) for param, g in pulled.items() if param in self.keep_params]

    def _taken(self, use: int) -> list[Tensor]:
        """Called when the backward pass of a use is done: the engine runs its probe's node next."""
        self.found[use], self._fresh = self._fresh, []
        return [t for _, factors in self.found[use] for t in taken_apart(factors)[0]]


def _written_out(weight: Weight, factors: Factors) -> Tensor:
    """`[B, *weight.shape]`, where the memory allows it."""
    if isinstance(factors, Dense):
        return factors.gradients
    names = "a weight that is computed from parameters"
    if isinstance(factors, Outer) and factors.layout.labels is None and factors.layout.dim == 0:
        a, b = (factors.b, factors.a) if factors.transposed else (factors.a, factors.b)
        batch, entries = factors.layout.batch, a.shape[-1] * b.shape[-1]
        if batch * entries * a.element_size() <= cost_model(a.device.type).kept_bytes:
            a = factors.layout.grouped(a).reshape(batch, -1, a.shape[-1])
            b = factors.layout.grouped(b).reshape(batch, -1, b.shape[-1])
            return torch.bmm(b.transpose(1, 2), a)
    raise CannotCompileError(f"the per-sample gradients of {names} would have to be kept")


class _Follow(Interpreter):
    """Runs a Dynamo graph under a capture."""

    def __init__(self, graph: GraphModule, capture: TracedCapture) -> None:
        super().__init__(graph)
        self.capture = capture

    def run_node(self, n: Node) -> Any:
        """Note who makes weights."""
        out = super().run_node(n)
        mark = self.capture.mark_of(out) if isinstance(out, Tensor) and n.op != "placeholder" else None
        if isinstance(mark, Weight):
            self.capture.made.setdefault(mark, n)
        return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Higher-order operators have no torch function that the capture could see."""
        if isinstance(target, torch._ops.HigherOrderOperator):
            if target is not torch._higher_order_ops.wrap.tag_activation_checkpoint:
                raise CannotCompileError(f"it contains the higher-order operator {target}")
            if self.capture.planning:  # nothing is to be saved
                return Interpreter(args[0]).run(*args[1:])
            return target(*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor in the graph itself must be a constant."""
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor) and value.requires_grad:
            raise CannotCompileError(f"its graph holds the tensor {target} with a gradient")
        return value


def follow_graph(graph: GraphModule, capture: TracedCapture, inputs: Sequence[Any]) -> list[Any]:
    """The graph's outputs; its operations are seen by the capture."""
    with capture:
        out = _Follow(graph, capture).run(*inputs)
    return list(out) if isinstance(out, (tuple, list)) else [out]


class Again:
    """Makes weights anew outside of the compiled graph, from the real ones, by the nodes that made them.

    Args:
        graph: what Dynamo traced.
        nodes: of the weights wanted.
    """

    def __init__(self, graph: GraphModule, nodes: Iterable[Node]) -> None:
        self._graph, self._wanted = graph, set(nodes)
        needed = set(self._wanted)
        for node in reversed(list(graph.graph.nodes)):
            if node in needed:
                needed.update(node.all_input_nodes)
        self._nodes = [node for node in graph.graph.nodes if node in needed and node.op != "placeholder"]

    def marks(self, capture: Capture, inputs: Sequence[Any]) -> dict[int | Node, Weight]:
        """What the capture says of these weights, for the real inputs of the graph."""
        if not self._wanted:
            return {}
        run = Interpreter(self._graph, garbage_collect_values=False)
        places = (node for node in self._graph.graph.nodes if node.op == "placeholder")
        run.env = dict(zip(places, inputs, strict=True))
        with capture:
            for node in self._nodes:
                run.env[node] = run.run_node(node)
        marks = {node: capture.mark_of(run.env[node]) for node in self._wanted}
        return {node: mark for node, mark in marks.items() if isinstance(mark, Weight)}
