"""Any other operation with a forward-mode derivative: ⟨g_i, G⟩ is the output's gradient times its change along G.

One more forward evaluation of the operation per direction; exact whatever the operation does with the weight, as
long as the rows of its output belong to known samples.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from assay.capture.call import Call, operands
from assay.capture.factors import Directional
from assay.capture.layout import Layout
from assay.capture.marks import Weight


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

    def apply(*values: Tensor) -> Any:
        first = values[0].clone() if call.in_place else values[0]
        args, kwargs = rebuild([first, *values[1:]])
        result = call.func(*args, **kwargs)
        return first if call.in_place else result

    def explain(gy: Tensor, saved: Any) -> list[tuple[Weight, Directional]]:
        primals = [t.detach() for t in saved]
        return [(mark, Directional(apply, primals, i, gy, where)) for i, mark in weights.items()]

    return call.observe(y, explain, *tensors)
