"""What one parameter's step is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Group", "Inputs", "State", "joined"]

Group = dict[str, Any]
State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Inputs:
    """A parameter before its step, or entries of it.

    Attributes:
        group: The optimizer's group that it is in.
        state: The optimizer's state for it.
        w: Its entries.
        g: The gradient that ``step()`` will receive, of the same shape.
    """

    group: Group
    state: State
    w: Tensor
    g: Tensor

    def flat(self) -> Inputs:
        """Return the same, its entries in one dimension."""
        return self._mapped(lambda x: x.reshape(-1), lambda x: x.shape == self.w.shape)

    def at(self, read: Callable[[Tensor], Tensor]) -> Inputs:
        """Return some of the entries, as ``read`` picks them out of a tensor of the parameter's shape."""
        # a step's number has no dimension, and so has what belongs to a parameter without one
        return self._mapped(read, lambda x: x.dim() > 0 and x.shape == self.w.shape)

    def _mapped(self, read: Callable[[Tensor], Tensor], entrywise: Callable[[Tensor], bool]) -> Inputs:
        state = {k: read(x) if isinstance(x, Tensor) and entrywise(x) else x for k, x in self.state.items()}
        return replace(self, state=state, w=read(self.w), g=read(self.g))

    def kind(self) -> tuple[Any, ...] | None:
        """Return what must agree for entries of two parameters to be read as one's; None where none may be.

        A number that lies on a device is not looked at.
        """
        found: list[Any] = [id(self.group), self.w.dtype, self.w.device, self.g.dtype]
        if not self.w.dim():
            return None
        for name, x in self.state.items():
            if x is None or isinstance(x, (int, float)):
                found.append((name, x))
            elif not isinstance(x, Tensor):
                return None
            elif x.shape == self.w.shape:
                found.append((name, x.dtype, x.device))
            elif x.dim() or x.device.type != "cpu":
                return None
            else:
                found.append((name, x.item()))
        return tuple(found)


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Return flat inputs of one :meth:`Inputs.kind` one behind the other."""
    first = parts[0]
    state = {
        k: torch.cat([part.state[k] for part in parts])
        if isinstance(x, Tensor) and x.shape == first.w.shape
        else x
        for k, x in first.state.items()
    }
    w, g = torch.cat([part.w for part in parts]), torch.cat([part.g for part in parts])
    return Inputs(first.group, state, w, g)
