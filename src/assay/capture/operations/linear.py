"""Linear layers in every spelling: `F.linear`, `addmm` (HF `Conv1D`), `x @ W`.

The per-sample gradient of W `[p, d]` is `g_i = Σ_t b_it ⊗ a_it`, that of the bias `Σ_t b_it`, with a the activations
and b the gradient of the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.factors import Outer
from assay.capture.layout import Layout
from assay.capture.marks import Weight
from assay.capture.probe import ObservedLinear


@rule(F.linear)
def linear(call: Call) -> Any:
    """`F.linear(x [..., d], W [p, d], b [p])`."""
    return _linear(call, call.args[0], call.argument(1, "weight"), call.argument(2, "bias"), transposed=False)


@rule(torch.addmm, Tensor.addmm)
def addmm(call: Call) -> Any:
    """`addmm(b [p], x [n, d], W [d, p])`."""
    bias, x, weight = call.args[0], call.argument(1, "mat1"), call.argument(2, "mat2")
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1 or bias.dim() != 1:
        return NotImplemented
    return _linear(call, x, weight, bias, transposed=True)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(call: Call) -> Any:
    """`x [..., d] @ W [d, p]`."""
    x, weight = call.args[0], call.args[1] if len(call.args) > 1 else next(iter(call.kwargs.values()))
    return _linear(call, x, weight, None, transposed=True)


def _linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Any:
    layout, on_weight, on_bias = call.layout(x), call.weight(weight), call.weight(bias)
    if (
        layout is None
        or weight.dim() != 2
        or x.dim() < 2
        or layout.dim == x.dim() - 1
        or call.layout(weight) is not None
        or (bias is not None and (bias.dim() != 1 or call.layout(bias) is not None))
        or "out" in call.kwargs
    ):
        return NotImplemented
    x, weight, bias = _autocast(x, weight, bias)
    if call.capture.strict or call.capture.by_token or not weight.requires_grad:
        return _watched(call, x, weight, bias, (on_weight, on_bias), layout, transposed)
    y = ObservedLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, call.capture.probe, call.capture, (on_weight, on_bias), layout, transposed
    )
    return call.capture.note(call, (on_weight, on_bias), y, layout.at(layout.dim), "linear")


def _watched(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    marks: tuple[Weight | None, Weight | None],
    layout: Layout,
    transposed: bool,
) -> Tensor:
    """The call as torch makes it, its own weight gradient untouched (`strict`, `by_token`, frozen weights)."""
    on_weight, on_bias = marks

    def explain(gy: Tensor, saved: Any) -> list[Any]:
        uses: list[Any] = []
        if on_weight is not None:
            uses.append((on_weight, Outer(saved[0].to(gy.dtype), gy, layout, transposed)))
        if on_bias is not None:
            uses.append((on_bias, call.spread(gy, layout, (gy.shape[-1],))))
        return uses

    return call.observe(call.run(), explain, *([x] if on_weight is not None else []))


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The operands as autocast would hand them to the kernel."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors)
