"""Convolutions: the unfolded input turns them into a linear layer over patches.

g_i = Σ_l b_il ⊗ a_il with l the output positions and a_il the patch under the kernel (group by group). Inner products
with known directions need no unfolding: they take one more convolution per direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.factors import Patches, Windows


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(call: Call) -> Any:
    """`conv(x [B, c, ...], W [p, c/groups, ...], b [p], stride, padding, dilation, groups)`."""
    x, weight, bias = call.args[0], call.argument(1, "weight"), call.argument(2, "bias")
    layout, on_weight, on_bias = call.layout(x), call.weight(weight), call.weight(bias)
    if layout is None or layout.dim != 0 or x.dim() != weight.dim():
        return NotImplemented
    if call.layout(weight) is not None or call.layout(bias) is not None:
        return NotImplemented
    func, rest = call.func, call.args[3:]
    windows = _windows(call, weight.shape[2:])
    options = {k: v for k, v in call.kwargs.items() if k not in ("weight", "bias", "input")}

    def moved(w: Tensor, inputs: Tensor) -> Tensor:
        return func(inputs, w, None, *rest, **options)  # type: ignore[no-any-return]

    def explain(gy: Tensor, saved: Any) -> list[Any]:
        uses: list[Any] = []
        if on_weight is not None:
            primals = [weight.detach().to(gy.dtype), saved[0].to(gy.dtype)]
            uses.append((on_weight, Patches(moved, primals, 0, gy, layout, windows)))
        if on_bias is not None:
            width = gy.shape[1]
            uses.append((on_bias, call.spread(gy, layout, (width, *(1,) * (gy.dim() - 2)), (width,))))
        return uses

    return call.observe(call.run(), explain, *([x] if on_weight is not None else []))


def _windows(call: Call, kernel: torch.Size) -> Windows:
    """Where the kernel is laid on the input."""
    names = ("stride", "padding", "dilation")
    given = [
        call.argument(3 + i, name, default)
        for i, (name, default) in enumerate(zip(names, (1, 0, 1), strict=True))
    ]
    stride, dilation = (_each(given[i], len(kernel)) for i in (0, 2))
    if given[1] == "same":
        around = tuple(
            (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)
        )
    else:
        around = tuple((p, p) for p in _each(0 if given[1] == "valid" else given[1], len(kernel)))
    return Windows(tuple(kernel), stride, around, dilation, call.argument(6, "groups", 1))


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    """One number per dimension of space."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dimensions if len(values) == 1 else values
