"""Convolutions: the unfolded input turns them into a linear layer over patches.

g_i = Σ_l b_il ⊗ a_il with l the output positions and a_il the patch under the kernel (group by group). Inner products
with known directions need no unfolding: they take one more convolution per direction; and the patches' products with
the rows of a projection are a convolution with these rows for kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.factors import Directional, Patches


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
    options = {k: v for k, v in call.kwargs.items() if k not in ("weight", "bias", "input")}

    def explain(gy: Tensor, saved: Any) -> list[Any]:
        uses: list[Any] = []
        if on_weight is not None:
            inputs = saved[0].to(gy.dtype)

            def moved(w: Tensor) -> Tensor:
                return func(inputs, w, None, *rest, **options)  # type: ignore[no-any-return]

            kind = Patches if weight.shape[1] == inputs.shape[1] else Directional  # one group, or several
            uses.append((on_weight, kind(moved, [weight.detach().to(gy.dtype)], 0, gy, layout)))
        if on_bias is not None:
            width = gy.shape[1]
            uses.append((on_bias, call.spread(gy, layout, (width, *(1,) * (gy.dim() - 2)), (width,))))
        return uses

    return call.observe(call.run(), explain, *([x] if on_weight is not None else []))
