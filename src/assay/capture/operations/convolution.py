"""Convolutions: the unfolded input turns them into a linear layer over patches.

g_i = Σ_l b_il ⊗ a_il with l the output positions and a_il the patch under the kernel (group by group). Inner products
with known directions need no unfolding: they take one more convolution per direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.factors import Dense, Directional


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

            uses.append((on_weight, Directional(moved, [weight.detach().to(gy.dtype)], 0, gy, layout)))
        if on_bias is not None:
            channels = gy.movedim(1, -1)  # [B, ..., p]
            uses.append((on_bias, Dense(layout.per_sample_sum(channels, keep=1))))
        return uses

    return call.observe(call.run(), explain, *([x] if on_weight is not None else []))
