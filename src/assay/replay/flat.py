"""The trained parameters and their optimizer state as long vectors, so that a step is a few operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from assay.capture.room import Room
from assay.errors import InputError

__all__ = ["Flat", "Span"]


@dataclass(frozen=True)
class Span:
    """Neighbouring entries that one step treats alike.

    Args:
        start: first entry.
        stop: the one behind the last.
        group: index of their parameter group.
        count: the optimizer's own number of the coming step, from 1; for SGD 1 while there is no momentum buffer and
            2 afterwards.
        active: whether they have a gradient; if not, the step passes over them.
    """

    start: int
    stop: int
    group: int
    count: int
    active: bool


class Flat:
    """The optimizer's trainable parameters, in the order of its groups, end to end.

    Args:
        model: that holds them.
        optimizer: that owns them.

    Raises:
        InputError: a parameter of the optimizer is not in the model.
    """

    def __init__(self, model: Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        names = {p: name for name, p in model.named_parameters()}
        groups = optimizer.param_groups
        found = [(p, i) for i, group in enumerate(groups) for p in group["params"] if p.requires_grad]
        self.params = [p for p, _ in found]
        self.groups = [i for _, i in found]
        foreign = sum(p not in names for p in self.params)
        if foreign or not found:
            raise InputError(
                f"adjoint(model, optimizer): {foreign or 'all'} of the optimizer's {len(self.params)} parameters are "
                "not in the model; pass the model that was trained and the optimizer that is made from it."
            )
        self.names = [names[p] for p in self.params]
        self.sizes = [p.numel() for p in self.params]
        self.total = sum(self.sizes)
        self._room = Room()

    def join(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """`[P]`: copies of tensors of the parameters' shapes, end to end; zeros for None."""
        parts = [
            p.new_zeros(p.numel()) if x is None else x.detach().reshape(-1)
            for p, x in zip(self.params, tensors, strict=True)
        ]
        return torch.cat(parts, out=self._empty([self.total], parts))

    def join_rows(self, tensors: Sequence[Tensor | None], rows: int) -> Tensor:
        """`[rows, P]` from tensors `[rows, *shape]`."""
        parts = [
            p.new_zeros(rows, p.numel()) if x is None else x.detach().reshape(rows, -1)
            for p, x in zip(self.params, tensors, strict=True)
        ]
        return torch.cat(parts, 1, out=self._empty([rows, self.total], parts))

    def empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        """`[rows, P]`, not filled: memory that is used again from step to step."""
        return self._room.empty([rows, self.total], dtype, self.params[0].device)

    def _empty(self, shape: list[int], parts: Sequence[Tensor]) -> Tensor:
        dtype = reduce(torch.promote_types, (x.dtype for x in parts))
        return self._room.empty(shape, dtype, self.params[0].device)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Views `[rows, *shape]` of `[rows, P]`."""
        parts = rows.split(self.sizes, 1)  # type: ignore[no-untyped-call]
        return [x.reshape(len(rows), *p.shape) for x, p in zip(parts, self.params, strict=True)]

    @torch.no_grad()
    def put(self, weights: Tensor) -> None:
        """Set the parameters to `[P]`."""
        for p, x in zip(self.params, weights.split(self.sizes), strict=True):  # type: ignore[no-untyped-call]
            p.copy_(x.view_as(p))

    def weights(self) -> Tensor:
        """`[P]`, a copy."""
        return self.join(self.params)

    def gradients(self) -> Tensor:
        """`[P]`, a copy; zeros where there is none."""
        return self.join([p.grad for p in self.params])

    def buffer(self, name: str) -> Tensor:
        """`[P]`: a buffer of the optimizer, a copy; zeros where there is none yet."""
        return self.join([self.optimizer.state.get(p, {}).get(name) for p in self.params])

    def spans(self) -> list[Span]:
        """How the coming step treats the entries; gradients are there."""
        spans: list[Span] = []
        stop = 0
        for p, group in zip(self.params, self.groups, strict=True):
            start, stop = stop, stop + p.numel()
            key = (group, self._count(self.optimizer.state.get(p, {})), p.grad is not None)
            last = spans[-1] if spans else None
            if last is not None and (last.group, last.count, last.active) == key:
                spans[-1] = Span(last.start, stop, *key)
            else:
                spans.append(Span(start, stop, *key))
        return spans

    @staticmethod
    def _count(state: dict[str, object]) -> int:
        if "step" in state:
            return int(float(state["step"])) + 1  # type: ignore[arg-type]
        return 1 if state.get("momentum_buffer") is None else 2
