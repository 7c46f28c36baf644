"""A backward pass in any of its three spellings: what was asked for, and the engine's run of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BACKWARD", "BackwardPass"]


@dataclass(frozen=True)
class BackwardPass:
    """A backward pass that somebody asks for.

    Args:
        roots: where it begins.
        seeds: their gradients; None for the one of a scalar.
        leaves: where it ends, as the caller named them; none for all leaves.
        accumulates: whether gradients are added to `.grad`, and not returned.
        retain_graph: likewise of the caller's arguments.
        create_graph: likewise.
        allow_unused: likewise.
        materialize_grads: likewise.
    """

    roots: tuple[Tensor, ...]
    seeds: tuple[Tensor | None, ...]
    leaves: tuple[Any, ...]
    accumulates: bool
    retain_graph: bool
    create_graph: bool
    allow_unused: bool
    materialize_grads: bool

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BackwardPass:
        """What `func` (a key of `BACKWARD`) is called for."""
        given = inspect.signature(BACKWARD[func]).bind(
            *args, **{_SPELLINGS.get(k, k): v for k, v in kwargs.items()}
        )
        given.apply_defaults()
        call = given.arguments
        roots = _tuple(call["tensors"])
        create_graph = bool(call["create_graph"])
        return cls(
            roots,
            _tuple(call["gradients"]) or (None,) * len(roots),
            _tuple(call["inputs"]),
            func is not torch.autograd.grad,
            create_graph if call["retain_graph"] is None else bool(call["retain_graph"]),
            create_graph,
            bool(call.get("allow_unused")),
            bool(call.get("others", {}).get("materialize_grads")),
        )

    def run(self, probe: Tensor | None, under: AbstractContextManager[Any]) -> Any:
        """What the caller's spelling does.

        The engine is called directly, because under a capture every public spelling would come straight back to it.

        Args:
            probe: gets its gradient too where the caller named leaves; None for a pass that does not count.
            under: what is active while the engine runs: activation checkpointing runs forward passes inside it.
        """
        leaves = self.leaves
        if self.accumulates and leaves and probe is not None:
            leaves = (*leaves, probe)
        filled = tuple(_seed(root, seed) for root, seed in zip(self.roots, self.seeds, strict=True))
        with under:
            found = torch.autograd.Variable._execution_engine.run_backward(
                self.roots, filled, self.retain_graph, self.create_graph, leaves,
                allow_unreachable=self.accumulates or self.allow_unused or self.materialize_grads,
                accumulate_grad=self.accumulates,
            )  # fmt: skip
        if self.accumulates:
            return None
        if self.materialize_grads:
            return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))
        return found


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


BACKWARD: dict[Callable[..., Any], Callable[..., None]] = {
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
