"""Any other operation with a forward-mode derivative: ⟨g_i, G⟩ is the output's gradient times its change along G.

One more forward evaluation of the operation per direction; exact whatever the operation does with the weight, as
long as the rows of its output belong to known samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.capture.call import Call, operands
from assay.capture.factors import Directional
from assay.capture.layout import Layout
from assay.capture.marks import Weight


def _distances(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """`torch.cdist`, x `[..., n, d]` and y `[..., m, d]`: `[..., n, m]`."""
    apart = x.unsqueeze(-2) - y.unsqueeze(-3)
    found: Tensor = torch.linalg.vector_norm(apart, p, dim=-1)
    return found


# what has neither a forward-mode nor a second derivative, written in operations that have; for derivatives alone
_DIFFERENTIABLE: dict[str, Callable[..., Tensor]] = {"cdist": _distances}


def general_rule(call: Call) -> Any:
    """Run the call and watch its output; refuse by name where the samples cannot be found in it."""
    tensors, rebuild = operands(call.args, call.kwargs)
    weights = {i: mark for i, t in enumerate(tensors) if (mark := call.weight(t)) is not None}
    if call.in_place:
        tensors[0] = tensors[0].clone()  # the call is about to overwrite it
    y = call.run()
    if call.name == "__setitem__":
        y = call.args[0]
    if not isinstance(y, Tensor):
        call.capture.refuse(call, weights.values(), "it returns several tensors")
        return y
    layout = call.capture.layout_of(call, y)
    if not y.requires_grad:
        return y
    if layout is None:
        call.capture.refuse(call, weights.values(), "its output does not keep the samples apart")
        return y
    where: Layout = layout
    func: Callable[..., Any] = _DIFFERENTIABLE.get(call.name, call.func)

    def apply(*values: Tensor) -> Any:
        first = values[0].clone() if call.in_place else values[0]
        args, kwargs = rebuild([first, *values[1:]])
        result = func(*args, **kwargs)
        return first if call.in_place else result

    def explain(gy: Tensor, saved: Any) -> list[tuple[Weight, Directional]]:
        primals = [t.detach() for t in saved]
        return [
            (
                mark,
                Directional(apply, primals, i, gy, where, of=f"{call.capture.names_of(mark)}, `{call.name}`"),
            )
            for i, mark in weights.items()
        ]

    return call.observe(y, explain, *tensors)
