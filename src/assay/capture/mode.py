"""The capture: sees every torch function of a training step and watches those that bring weights and samples together.

While it is active, each call is sorted by what its operands are:

* no weight: run it, and follow where the samples go (`track`);
* weights but no sample: run it; the result is a weight again, with its own derivative (`marks.derive`);
* both: a use. The rule of the operation (`operations`) runs the call and reads, in the backward pass, the weights'
  per-sample gradients from the gradient of the output (`probe`, `factors`).

A use for which no exact rule exists is refused by name. Nothing is skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from assay.capture.call import RULES, Call, writes_in_place
from assay.capture.coverage import Coverage
from assay.capture.factors import Factors, apart_from
from assay.capture.layout import Layout
from assay.capture.marks import CONSTANT, MIXED, Data, Directions, Mark, Weight, derive, leaf
from assay.capture.operations import general_rule, open_composite
from assay.capture.operations.general import operands
from assay.capture.probe import Explain, Observe, ObserveInPlace, Use
from assay.capture.track import follow
from assay.errors import CoverageError

__all__ = ["Capture", "Weights"]


class Weights:
    """The parameters whose per-sample gradients are wanted, each with its name and its group.

    A group is a set of parameters whose scores may be added before the optimizer's scale is known (the optimizer's
    parameter groups).

    Args:
        named: name and parameter.
        groups: group index of each parameter.
        constants: further tensors of the model that carry no sample (buffers).

    Attributes:
        uncovered: parameters that the fallback measures, and why.
        fallback: which one, "forward mode" or "sample loop".
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Parameter]],
        groups: Mapping[Parameter, int],
        constants: Iterable[Tensor] = (),
    ) -> None:
        self.names = {param: name for name, param in named}
        self.groups = {param: groups[param] for param in self.names}
        self.marks = {id(param): leaf(param, self.groups[param]) for param in self.names}
        self.constants = {id(tensor): tensor for tensor in constants}  # held, so that no id is given anew
        self.uncovered: dict[Parameter, str] = {}
        self.fallback = ""
        self.number_of_groups = max(self.groups.values(), default=0) + 1

    def hand_over(self, params: Mapping[Parameter, str], fallback: str) -> None:
        """Leave these parameters, each with the reason, to the fallback at the model's boundary."""
        self.uncovered, self.fallback = dict(params), fallback
        for param in params:
            self.marks.pop(id(param), None)

    @property
    def params(self) -> list[Parameter]:
        """The parameters, in order."""
        return list(self.names)


class Capture(TorchFunctionMode):
    """Watches one micro-batch: active from before the forward pass until after the backward pass.

    Args:
        weights: the parameters to watch.
        batch: B, the number of samples.
        directions: `{parameter: [targets, *shape]}` along which per-sample gradients are measured; None measures
            nothing now.
        keep: the parameters whose per-sample gradients are to be kept in `kept`, for a contraction later.
        strict: leave torch's own weight gradients untouched, bit for bit.
        coverage: where uses are noted.
        refused: collects parameters with uses that no rule follows, and why; None raises at the first.

    Attributes:
        probe: `[groups, targets, B]`, zeros; after the backward pass `probe.grad` holds ⟨g_i, G_n⟩ by group.
        paused: while true, calls pass unseen.
        kept: the per-sample gradients of the parameters in `keep`, use by use.
    """

    def __init__(
        self,
        weights: Weights,
        batch: int,
        directions: Directions | None = None,
        *,
        keep: Collection[Parameter] = (),
        strict: bool = False,
        coverage: Coverage | None = None,
        refused: dict[Parameter, str] | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.batch, self.directions = weights, batch, directions
        self.keep, self.strict = frozenset(keep), strict
        self.coverage = coverage if coverage is not None else Coverage(weights.names)
        self.refused = refused
        self.kept: list[tuple[Weight, Factors]] = []
        some = next(iter(weights.params))
        targets = next(iter(directions.values())).shape[0] if directions else 1
        dtype = torch.promote_types(some.dtype, torch.float32)
        shape = (weights.number_of_groups, targets, batch)
        self.probe = torch.zeros(shape, dtype=dtype, device=some.device, requires_grad=True)
        self.uses = 0
        self.paused = False
        self._token = object()
        self._pushed: dict[Weight, dict[int, Tensor]] = {}

    # --- every call ---

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, seen as the module's text says."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func in _BACKWARD:
            return self._backward(func, args, kwargs)
        tensors = [t for value in (*args, *kwargs.values()) for t in _tensors(value)]
        marks = [self.mark_of(t) for t in tensors]
        if not torch.is_grad_enabled():
            marks = [CONSTANT if isinstance(mark, Weight) else mark for mark in marks]
        if any(isinstance(mark, Weight) for mark in marks):
            # a number that comes from all samples (which expert, how many) is a constant to a weight
            marks = [
                CONSTANT
                if isinstance(mark, Data) and mark.layout is None and not t.is_floating_point()
                else mark
                for t, mark in zip(tensors, marks, strict=True)
            ]
            if any(isinstance(mark, Data) for mark in marks):
                return self._use(func, args, kwargs)
        name = _name(func)
        in_place = writes_in_place(func, args, kwargs) and bool(tensors)
        if in_place and any(isinstance(mark, Weight) for mark in marks):
            tensors = [
                tensors[0].detach().clone(),
                *tensors[1:],
            ]  # as it was: a derivative may be asked for later
        out = func(*args, **kwargs)
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

    def _backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The backward pass, with the capture still active: activation checkpointing runs forward passes inside it.

        The engine is called directly, because every public spelling would hand the call straight back here.
        """
        given = inspect.signature(_BACKWARD[func]).bind(
            *args, **{_SPELLINGS.get(k, k): v for k, v in kwargs.items()}
        )
        given.apply_defaults()
        call = given.arguments
        roots = _tuple(call["tensors"])
        seeds = _tuple(call["gradients"]) or (None,) * len(roots)
        leaves = _tuple(call["inputs"])
        accumulate = func is not torch.autograd.grad
        if accumulate and leaves:
            leaves = (*leaves, self.probe)
        create_graph = bool(call["create_graph"])
        retain_graph = create_graph if call["retain_graph"] is None else call["retain_graph"]
        filled = tuple(_seed(root, seed) for root, seed in zip(roots, seeds, strict=True))
        with self:
            found = torch.autograd.Variable._execution_engine.run_backward(
                roots, filled, retain_graph, create_graph, leaves,
                allow_unreachable=accumulate or bool(call["allow_unused"]), accumulate_grad=accumulate,
            )  # fmt: skip
        return None if accumulate else found

    def _use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(self, func, _name(func), args, kwargs)
        rule = RULES.get(func)
        out = rule(call) if rule is not None else NotImplemented
        if out is NotImplemented:
            out = open_composite(call)
        if out is NotImplemented:
            out = general_rule(call)
        if isinstance(out, Tensor) and not isinstance(self._known(out), Data):
            self._set(out, Data(self.layout_of(call, out)))
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
        if data and not _name(func).startswith(_CREATES):
            if self.batch == 1:
                return Data(Layout(0, 1, inner=out.shape[0])) if out.dim() else MIXED
            layout = follow(_name(func), data, args, kwargs, out, position)
            return MIXED if layout is None else Data(layout)
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

        return derive(again, tensors, weights)

    # --- what is known of a tensor ---

    def mark_of(self, tensor: Tensor) -> Mark:
        """What is known of a tensor; one that was never seen carries samples if its first dimension has B rows."""
        known = self._known(tensor)
        if known is not None:
            return known
        weight = self.weights.marks.get(id(tensor))
        if weight is not None:
            return weight
        if isinstance(tensor, Parameter) or id(tensor) in self.weights.constants:
            return CONSTANT
        if self.batch == 1:
            return Data(Layout(0, 1, inner=tensor.shape[0])) if tensor.dim() else CONSTANT
        if tensor.dim() and tensor.shape[0] == self.batch:
            return Data(Layout(0, self.batch))
        return CONSTANT

    def enter(self, tensor: Tensor) -> None:
        """An input of the model: its rows are the samples, also where the caller made it inside the step."""
        known = self._known(tensor)
        if (known is None or known is CONSTANT) and tensor.dim() and tensor.shape[0] == self.batch:
            self._set(tensor, Data(Layout(0, self.batch)))

    def _known(self, tensor: Tensor) -> Mark | None:
        tagged = getattr(tensor, "_assay", None)
        return tagged[1] if tagged is not None and tagged[0] is self._token else None

    def _set(self, tensor: Tensor, mark: Mark) -> None:
        if id(tensor) not in self.weights.marks:
            tensor._assay = (self._token, mark)  # type: ignore[attr-defined]

    def layout_of(self, call: Call, out: Tensor) -> Layout | None:
        """Where the samples are in the result of a call."""
        if self.batch == 1:
            return Layout(0, 1, inner=out.shape[0]) if out.dim() else None
        tensors = [t for value in (*call.args, *call.kwargs.values()) for t in _tensors(value)]
        data = [(t, mark.layout) for t in tensors if isinstance(mark := self.mark_of(t), Data)]
        return follow(call.name, data, call.args, call.kwargs, out)

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
        tensors, _ = operands(call.args, call.kwargs)
        weights = tuple(mark for t in tensors if isinstance(mark := self.mark_of(t), Weight))
        if y.requires_grad:
            y = watch.apply(y, self.probe, Use(self, explain), *saved)  # type: ignore[no-untyped-call]
        return self.note(call, weights, y, layout, call.name)

    def note(
        self, call: Call, weights: Iterable[Weight | None], y: Tensor, layout: Layout | None, rule: str
    ) -> Tensor:
        """Mark the result of a use, and enter the use in the coverage."""
        self.uses += 1
        for weight in weights:
            if weight is not None:
                self.coverage.note(weight.params, call.name, rule, y)
        self._set(y, MIXED if layout is None else Data(layout))
        return y

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
            "rewrite the operation."
        )

    def names_of(self, weight: Weight | None) -> str:
        """The names of the parameters behind a weight."""
        return ", ".join(self.weights.names[param] for param in weight.params) if weight is not None else "?"

    def keeps(self, weight: Weight) -> bool:
        """Whether the per-sample gradients of this weight wait for a later contraction."""
        return not self.keep.isdisjoint(weight.params)

    def directions_of(self, weight: Weight) -> dict[int, Tensor]:
        """`{group: [targets, *weight.shape]}`: the directions pushed through to this weight; once per weight."""
        if self.directions is None or self.keeps(weight):
            return {}
        if weight not in self._pushed:
            self._pushed[weight] = weight.push(self.directions)
        return self._pushed[weight]

    def own_kept(self) -> None:
        """After the backward pass: nothing that is kept shares memory with a `.grad`."""
        storages = {p.grad.untyped_storage().data_ptr() for p in self.weights.params if p.grad is not None}
        self.kept = [(weight, apart_from(factors, storages)) for weight, factors in self.kept]

    def record(self, uses: Sequence[tuple[Weight, Factors]], like: Tensor) -> Tensor:
        """`[groups, targets, B]`: the inner products of these uses; those to be kept count nothing now."""
        scores = torch.zeros_like(like)
        for weight, factors in uses:
            if self.keeps(weight):
                self.kept.append((weight, factors))
            for group, directions in self.directions_of(weight).items():
                scores[group] += factors.dot(directions)
        return scores


def contract(kept: list[tuple[Weight, Factors]], directions: Directions, like: Tensor) -> Tensor:
    """`[groups, targets, B]`: the inner products of kept gradients with directions that became known later.

    Args:
        kept: what the capture kept of one micro-batch.
        directions: `{parameter: [targets, *shape]}`.
        like: the micro-batch's own scores, `[groups, any, B]`.
    """
    targets = next(iter(directions.values())).shape[0]
    scores = like.new_zeros(like.shape[0], targets, like.shape[2])
    for weight, factors in kept:
        for group, pushed in weight.push(directions).items():
            scores[group] += factors.dot(pushed)
    return scores


# functions that take of the samples at most how many there are
_CREATES = ("new_", "zeros", "ones", "full", "empty", "arange", "linspace", "eye")


# The signatures of the three spellings of a backward pass, under common names.
def _tensor_backward(
    tensors: Any,
    gradients: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None: ...


def _backward(
    tensors: Any,
    gradients: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None: ...


def _grad(
    tensors: Any,
    inputs: Any,
    gradients: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    **others: Any,
) -> None: ...


_BACKWARD: dict[Callable[..., Any], Callable[..., None]] = {
    Tensor.backward: _tensor_backward,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
}
_SPELLINGS = {
    "gradient": "gradients",
    "grad_tensors": "gradients",
    "grad_outputs": "gradients",
    "outputs": "tensors",
}


def _tuple(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,) if isinstance(value, Tensor) else tuple(value)


def _seed(root: Tensor, gradient: Tensor | None) -> Tensor | None:
    if gradient is not None or not root.requires_grad:
        return gradient
    if root.numel() != 1:
        raise RuntimeError("grad can be implicitly created only for scalar outputs")
    return torch.ones_like(root, memory_format=torch.preserve_format)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            if isinstance(part, Tensor):
                yield part


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property: x.T, x.mT, x.real, …
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name
