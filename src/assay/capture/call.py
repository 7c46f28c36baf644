"""One call of a torch function that brings weights and samples together, and the table of rules for such calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from assay.capture.layout import Layout
from assay.capture.marks import Data, Mark, Weight
from assay.capture.probe import Explain

if TYPE_CHECKING:
    from assay.capture.mode import Capture

__all__ = ["RULES", "Call", "Rule", "rule", "writes_in_place"]


def writes_in_place(
    func: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> bool:
    """Whether a call writes its result into its first operand: by its name, or by an argument `inplace`."""
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    code = getattr(func, "__code__", None)
    if code is not None and "inplace" in code.co_varnames:
        position = code.co_varnames.index("inplace")
        return bool((kwargs or {}).get("inplace", args[position] if len(args) > position else False))
    return name in _IN_PLACE


_OPERATORS = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor")
_IN_PLACE = frozenset({"__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)})


@dataclass(frozen=True)
class Call:
    """A call `func(*args, **kwargs)` seen by the capture.

    A rule computes the result, hands it to `observe` with the way to read the weights' gradients from the result's
    gradient, and returns what that returns. It returns `NotImplemented` for a form of the call that it does not
    know; the general rule then takes over.
    """

    capture: Capture
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

    def __str__(self) -> str:
        return self.name


Rule = Callable[[Call], Any]
RULES: dict[Callable[..., Any], Rule] = {}


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for these torch functions."""

    def register(body: Rule) -> Rule:
        for function in functions:
            RULES[function] = body
        return body

    return register
