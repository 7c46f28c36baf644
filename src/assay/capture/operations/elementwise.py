"""Scale and shift by a weight that broadcasts over the samples: hand-written norms, LayerScale, position embeddings.

Written for the weight expanded to every sample: y = x·w gives g_i = Σ_t gy·x, y = x + w gives g_i = Σ_t gy, summed
down to the shape of w. A shift that has rows of its own for every sample (`Apart`) is not summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.factors import Apart, Factors
from assay.capture.layout import Layout
from assay.capture.marks import Weight


@rule(torch.add, Tensor.add, Tensor.add_, Tensor.__radd__, Tensor.__iadd__)
def add(call: Call) -> Any:
    """`x + alpha·w` or `w + alpha·x`."""
    alpha = call.kwargs.get("alpha", 1)
    return _shift(call, (1, alpha))


@rule(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__isub__)
def sub(call: Call) -> Any:
    """`x − alpha·w` or `w − alpha·x`."""
    return _shift(call, (1, -call.kwargs.get("alpha", 1)))


@rule(torch.rsub, Tensor.__rsub__)
def rsub(call: Call) -> Any:
    """`other − self`."""
    return _shift(call, (-call.kwargs.get("alpha", 1), 1))


@rule(torch.mul, Tensor.mul, Tensor.__rmul__)
def mul(call: Call) -> Any:
    """`x·w` in either order."""
    pair = _data_and_weight(call)
    if pair is None:
        return NotImplemented
    x, weight, mark, _ = pair
    y = call.run()
    layout = call.capture.layout_of(call, y)
    if layout is None or not _broadcasts(weight, layout, y):
        return NotImplemented
    shape = tuple(weight.shape)

    def explain(gy: Tensor, saved: Any) -> list[tuple[Weight, Factors]]:
        return [(mark, call.spread(gy * saved[0], layout, shape))]

    return call.observe(y, explain, x)


def _shift(call: Call, signs: tuple[float, float]) -> Any:
    pair = _data_and_weight(call)
    if pair is None:
        return NotImplemented
    _, weight, mark, position = pair
    layout = call.capture.layout_by_shape(call)
    shape, x = tuple(weight.shape), call.args[1 - position]
    if layout is None:
        return NotImplemented
    apart = (
        isinstance(x, Tensor) and x.shape == shape
    )  # a row for every sample: positions expanded to the batch
    if not apart and not _broadcasts(weight, layout, x):
        return NotImplemented
    sign = signs[position]

    def explain(gy: Tensor, saved: Any) -> list[tuple[Weight, Factors]]:
        b = gy if sign == 1 else gy * sign
        return [
            (
                mark,
                Apart(_itself, [weight.detach()], 0, b, layout) if apart else call.spread(b, layout, shape),
            )
        ]

    return call.observe(call.run(), explain)


def _itself(weight: Tensor) -> Tensor:
    return weight


def _data_and_weight(call: Call) -> tuple[Tensor, Tensor, Weight, int] | None:
    """The operand with the samples, the weight, its mark and its position."""
    args = call.args if len(call.args) > 1 else (*call.args, *call.kwargs.values())
    for position in (0, 1):
        weight, x = args[position], args[1 - position]
        mark = call.weight(weight)
        if mark is not None and call.layout(x) is not None:
            return x, weight, mark, position
    return None


def _broadcasts(weight: Tensor, layout: Layout, y: Tensor) -> bool:
    """Whether every sample uses all of the weight: it has no extent along the samples' own dimension."""
    dim = layout.dim - y.dim() + weight.dim()
    return weight.dim() <= y.dim() and (dim < 0 or weight.shape[dim] == 1)
