"""One call of a torch function that brings weights and samples together, and the table of rules for such calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from assay.capture.factors import Elementwise, Factors
from assay.capture.layout import Layout
from assay.capture.marks import Data, Mark, Weight
from assay.capture.probe import Explain

__all__ = [
    "GENERAL",
    "RULES",
    "Call",
    "Rule",
    "Watcher",
    "input_first",
    "name_of",
    "operands",
    "rule",
    "tensors_of",
    "writes_in_place",
]


def writes_in_place(
    func: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> bool:
    """Whether a call writes its result into its first operand: by its name, or by an argument `inplace`."""
    writes = _writes(func)
    if isinstance(writes, bool):
        return writes
    return bool((kwargs or {}).get("inplace", args[writes] if len(args) > writes else False))


_OPERATORS = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor")
_IN_PLACE = frozenset({"__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)})


@lru_cache(maxsize=1024)
def _writes(func: Callable[..., Any]) -> bool | int:
    """Whether a function writes into its first operand, or the position of the argument `inplace` that tells."""
    name = getattr(func, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE:
        return True
    names = getattr(getattr(func, "__code__", None), "co_varnames", ())
    return names.index("inplace") if "inplace" in names else False


@lru_cache(maxsize=1024)
def name_of(func: Callable[..., Any]) -> str:
    """The name of a torch function; that of the property (`x.T`, `x.real`) where it is one."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def input_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call whose operand was given by its name, `torch.mm(input=x, mat2=w)`, as everybody else writes it."""
    if args or "input" not in kwargs or "condition" in kwargs:  # `torch.where(condition, input, other)`
        return args, kwargs
    return (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}


def tensors_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, and in those of them that are lists."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [part for part in value if isinstance(part, Tensor)]
    return found


def operands(args: Any, kwargs: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Any, Any]]]:
    """The tensors of a call in order, and the function that puts others in their places."""
    flat, spec = torch.utils._pytree.tree_flatten((args, dict(kwargs)))
    places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]

    def rebuild(tensors: list[Tensor]) -> tuple[Any, Any]:
        filled = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        rebuilt = torch.utils._pytree.tree_unflatten(filled, spec)
        return rebuilt[0], rebuilt[1]

    return [flat[i] for i in places], rebuild


class Watcher(Protocol):
    """What a rule may ask of the capture that saw the call; `mode.Capture` is the one implementation."""

    strict: bool
    by_token: bool
    probe: Tensor

    def __enter__(self) -> Any:
        """Go on watching inside: for the operations that a call is taken apart into."""
        ...

    def __exit__(self, *error: Any) -> None:
        """No longer."""
        ...

    def mark_of(self, tensor: Tensor) -> Mark:
        """What is known of a tensor."""
        ...

    def rows_as(self, x: Tensor, other: Tensor) -> Tensor:
        """`x`, which carries no sample, with its rows given to the samples of another tensor's rows."""
        ...

    def layout_of(self, call: Call, out: Tensor) -> Layout | None:
        """Where the samples are in the result of a call."""
        ...

    def layout_by_shape(self, call: Call) -> Layout | None:
        """The same for an elementwise call of two operands, before its result exists."""
        ...

    def observe(
        self, call: Call, y: Tensor, explain: Explain, saved: Sequence[Tensor], layout: Layout | None = None
    ) -> Tensor:
        """`y`, watched: `explain(gy, saved)` names the weights' factored gradients once gy is known."""
        ...

    def note(
        self, call: Call, weights: Iterable[Weight | None], y: Tensor, layout: Layout | None, rule: str
    ) -> Tensor:
        """Mark `y`, the result of a use that a rule watches by itself, and enter the use in the coverage."""
        ...

    def refuse(self, call: Call, weights: Iterable[Weight], reason: str) -> None:
        """Say that a use cannot be followed."""
        ...

    def names_of(self, weight: Weight | None) -> str:
        """The names of the parameters behind a weight."""
        ...


@dataclass(frozen=True)
class Call:
    """A call `func(*args, **kwargs)` seen by the capture.

    A rule computes the result, hands it to `observe` with the way to read the weights' gradients from the result's
    gradient, and returns what that returns. It returns `NotImplemented` for a form of the call that it does not
    know; the general rule then takes over.
    """

    capture: Watcher
    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def mark(self, value: Any) -> Mark | None:
        """What is known of an argument; None for what is not a tensor."""
        return self.capture.mark_of(value) if isinstance(value, Tensor) else None

    def weight(self, value: Any) -> Weight | None:
        """The mark of a weight, or None."""
        mark = self.mark(value)
        return mark if isinstance(mark, Weight) else None

    def layout(self, value: Any) -> Layout | None:
        """Where the samples are in an argument; None if nowhere or everywhere."""
        mark = self.mark(value)
        return mark.layout if isinstance(mark, Data) else None

    @property
    def in_place(self) -> bool:
        """Whether the call writes its result into its first operand."""
        return (self.name.endswith("_") and not self.name.endswith("__")) or self.name.startswith("__i")

    def run(self) -> Any:
        """The plain call."""
        return self.func(*self.args, **self.kwargs)

    def observe(self, y: Tensor, explain: Explain, *saved: Tensor) -> Tensor:
        """`y`, watched: `explain(gy, saved)` names the weights' factored gradients once gy is known."""
        return self.capture.observe(self, y, explain, saved)

    def spread(
        self,
        parts: Tensor,
        layout: Layout,
        shape: tuple[int, ...],
        weight_shape: tuple[int, ...] | None = None,
    ) -> Factors:
        """The gradients of a weight that was broadcast to the output: their sum by sample, unless tokens are asked for.

        Args:
            parts: the gradient of the weight spread over the output, of the output's shape.
            layout: where the samples are in it.
            shape: of the weight, such that it broadcasts to the output.
            weight_shape: its own, if it is another.
        """
        spread = Elementwise(parts, layout, shape, shape if weight_shape is None else weight_shape)
        return spread if self.capture.by_token else spread.summed()

    def __str__(self) -> str:
        return self.name


Rule = Callable[[Call], Any]
RULES: dict[Callable[..., Any], Rule] = {}
GENERAL: list[Rule] = []  # for any function, tried in this order where it has no rule that knows the call


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for these torch functions."""

    def register(body: Rule) -> Rule:
        for function in functions:
            RULES[function] = body
        return body

    return register
