"""Layer and RMS normalisation: y = x̂·w + b, so g_i(w) = Σ_t gy·x̂ and g_i(b) = Σ_t gy over sample i's rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.factors import Dense


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(call: Call) -> Any:
    """`F.layer_norm(x [..., *shape], shape, w, b, eps)`."""
    shape, eps = call.argument(1, "normalized_shape"), call.argument(4, "eps", 1e-5)
    return _norm(call, shape, call.argument(3, "bias"), lambda x: F.layer_norm(x, shape, None, None, eps))


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(call: Call) -> Any:
    """`F.rms_norm(x [..., *shape], shape, w, eps)`."""
    shape, eps = call.argument(1, "normalized_shape"), call.argument(3, "eps")
    return _norm(call, shape, None, lambda x: F.rms_norm(x, shape, None, eps))


def _norm(call: Call, shape: Any, bias: Tensor | None, normalise: Any) -> Any:
    x, weight = call.args[0], call.argument(2, "weight")
    layout, on_weight, on_bias = call.layout(x), call.weight(weight), call.weight(bias)
    keep = 1 if isinstance(shape, int) else len(shape)
    if layout is None or layout.dim >= x.dim() - keep:
        return NotImplemented
    if call.layout(weight) is not None or call.layout(bias) is not None:
        return NotImplemented

    def explain(gy: Tensor, saved: Any) -> list[Any]:
        uses: list[Any] = []
        if on_weight is not None:
            normal = normalise(saved[0]).to(gy.dtype)  # x̂ again, cheaper than keeping it
            uses.append((on_weight, Dense(layout.per_sample_sum(gy * normal, keep))))
        if on_bias is not None:
            uses.append((on_bias, Dense(layout.per_sample_sum(gy, keep))))
        return uses

    return call.observe(call.run(), explain, *([x] if on_weight is not None else []))
