"""What is kept of a compiled backward pass leaves it as gradients: of inputs that are there for nothing else.

A compiled backward pass returns the gradients of its inputs and nothing more. So every tensor of a kept factor gets
an input of its own, a *slot*: zeros without memory of the same shape, whose "gradient" is that tensor. Which slots a
graph needs is found out by following it on fake tensors first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from assay.capture.compiled.reasons import CannotCompileError
from assay.capture.factors import Factors
from assay.faults import Faults

__all__ = ["Deliver", "Form", "Receive", "Slot", "taken_apart"]

Build = Callable[[Iterator[Tensor]], Any]


@dataclass(frozen=True)
class Slot:
    """The shape of a tensor that leaves a backward pass as a gradient, and the dtype that it had.

    Whole numbers travel as float64, which holds every index exactly.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Slot:
        """The slot for a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def carrier(self) -> torch.dtype:
        """The dtype of the slot's gradient."""
        return self.dtype if self.dtype.is_floating_point else torch.float64

    def empty(self, device: torch.device) -> Tensor:
        """`[*shape]` zeros in the memory of one."""
        return torch.zeros((), dtype=self.carrier, device=device).expand(self.shape)


@dataclass(frozen=True)
class Form:
    """One kept use: its weight, its slots, and how its factors come of them.

    Args:
        weight: position among the graph's inputs, or the node that makes the weight.
        slots: one per tensor.
        build: from these tensors to the factors.
    """

    weight: int | Node
    slots: tuple[Slot, ...]
    build: Build

    def factors(self, tensors: Sequence[Tensor]) -> Factors:
        """The factors from the gradients of the slots."""
        back = (t if t.dtype == s.dtype else t.to(s.dtype) for t, s in zip(tensors, self.slots, strict=True))
        return self.build(back)  # type: ignore[no-any-return]


def taken_apart(value: Any) -> tuple[list[Tensor], Build]:
    """The tensors of factors (or of one of their fields), and the function that puts others in their places."""
    if isinstance(value, Tensor):
        return [value], next
    if isinstance(value, (list, tuple)):
        parts = [taken_apart(part) for part in value]
        kind = list if isinstance(value, list) else tuple
        return _joined(parts), lambda tensors: kind(build(tensors) for _, build in parts)
    if is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dataclass_params__"):
        held = {f.name: taken_apart(getattr(value, f.name)) for f in fields(value)}
        kind_of = type(value)
        return _joined(held.values()), lambda tensors: kind_of(
            **{name: build(tensors) for name, (_, build) in held.items()}
        )
    if isinstance(value, FunctionType) and value.__closure__:
        return _function(value)
    return [], lambda _: value


def _joined(parts: Any) -> list[Tensor]:
    return [tensor for tensors, _ in parts for tensor in tensors]


def _function(function: FunctionType) -> tuple[list[Tensor], Build]:
    """A function over tensors that it closed over (the input of a convolution)."""
    cells = function.__closure__ or ()
    places = [k for k, cell in enumerate(cells) if isinstance(cell.cell_contents, Tensor)]

    def build(tensors: Iterator[Tensor]) -> FunctionType:
        filled = list(cells)
        for place in places:
            filled[place] = CellType(next(tensors))
        made = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(filled)
        )
        made.__kwdefaults__ = function.__kwdefaults__
        return made

    return [cells[place].cell_contents for place in places], build


class Deliver(torch.autograd.Function):
    """Inside the trace: the probe of one use, which hands what the use kept to its slots."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, take: Callable[[], list[Tensor]], *slots: Tensor) -> Tensor:
        """The probe under a new node; `take()` gives, in the backward pass, what the use has kept."""
        ctx.take, ctx.slots = take, [(tuple(slot.shape), slot.dtype) for slot in slots]
        return probe.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The probe's own gradient, and the kept tensors as those of the slots."""
        tensors = ctx.take()
        if ctx.slots and [tuple(t.shape) for t in tensors] != [shape for shape, _ in ctx.slots]:
            raise CannotCompileError("its backward pass keeps other tensors than were planned for")
        if not ctx.slots:
            return (gradients[0], None)
        carried = (t.to(dtype) for t, (_, dtype) in zip(tensors, ctx.slots, strict=True))
        return (gradients[0], None, *carried)


class Receive(torch.autograd.Function):
    """Outside: makes the slots of one call of the compiled graph, and takes their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        probe: Tensor,
        slots: Sequence[Slot],
        sink: Callable[[Sequence[Tensor | None]], None],
        faults: Faults,
    ) -> tuple[Tensor, ...]:
        """One tensor per slot."""
        ctx.sink, ctx.faults = sink, faults
        ctx.set_materialize_grads(False)
        return tuple(slot.empty(probe.device) for slot in slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None, None]:
        """Hand the gradients over; nothing flows further."""
        with torch._C.DisableTorchFunction(), ctx.faults.caught("in the backward pass"):
            ctx.sink(gradients)
        return None, None, None, None
