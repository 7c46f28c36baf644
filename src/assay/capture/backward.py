"""A backward pass in any of its three spellings, run so that a probe takes part in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ["BACKWARD", "run_backward"]


def run_backward(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    probe: Tensor,
    under: AbstractContextManager[Any],
) -> Any:
    """What `func` (a key of `BACKWARD`) does, with `probe` among the leaves where the caller named some.

    The engine is called directly, because under a capture every public spelling would come straight back to it.

    Args:
        func: the spelling.
        args: its positional arguments.
        kwargs: its keyword arguments.
        probe: gets its gradient too.
        under: what is active while the engine runs: activation checkpointing runs forward passes inside it.
    """
    given = inspect.signature(BACKWARD[func]).bind(
        *args, **{_SPELLINGS.get(k, k): v for k, v in kwargs.items()}
    )
    given.apply_defaults()
    call = given.arguments
    roots = _tuple(call["tensors"])
    seeds = _tuple(call["gradients"]) or (None,) * len(roots)
    leaves = _tuple(call["inputs"])
    accumulate = func is not torch.autograd.grad
    if accumulate and leaves:
        leaves = (*leaves, probe)
    create_graph = bool(call["create_graph"])
    retain_graph = create_graph if call["retain_graph"] is None else call["retain_graph"]
    filled = tuple(_seed(root, seed) for root, seed in zip(roots, seeds, strict=True))
    with under:
        found = torch.autograd.Variable._execution_engine.run_backward(
            roots, filled, retain_graph, create_graph, leaves,
            allow_unreachable=accumulate or bool(call["allow_unused"]), accumulate_grad=accumulate,
        )  # fmt: skip
    return None if accumulate else found


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
