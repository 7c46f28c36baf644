"""Normalisation: y = x̂·w + b, so g_i(w) = Σ_t gy·x̂ and g_i(b) = Σ_t gy over sample i's entries.

x̂ is computed again in the backward pass, cheaper than keeping it. In training mode the x̂ of batch normalisation
depends on the whole batch; a sample's gradient is then what flows through its own use of w and b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.layer_norm import ObservedLayerNorm


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(call: Call) -> Any:
    """`F.layer_norm(x [..., *shape], shape, w, b, eps)`."""
    shape, eps = call.argument(1, "normalized_shape"), call.argument(4, "eps", 1e-5)
    y = _layer_norm(call, (shape,) if isinstance(shape, int) else tuple(shape), eps)
    if y is not None:
        return y
    return _norm(call, shape, call.argument(3, "bias"), lambda x: F.layer_norm(x, shape, None, None, eps))


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(call: Call) -> Any:
    """`F.rms_norm(x [..., *shape], shape, w, eps)`."""
    shape, eps = call.argument(1, "normalized_shape"), call.argument(3, "eps")
    return _norm(call, shape, None, lambda x: F.rms_norm(x, shape, None, eps))


def _layer_norm(call: Call, shape: tuple[int, ...], eps: float) -> Tensor | None:
    """The form that makes its weight gradients itself; None where something asks for the general one."""
    capture, x = call.capture, call.args[0]
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    layout, on_weight, on_bias = call.layout(x), call.weight(weight), call.weight(bias)
    if (
        capture.strict
        or capture.by_token
        or layout is None
        or on_weight is None
        or not weight.requires_grad
        or (bias is not None and (on_bias is None or not bias.requires_grad))
        or x.dim() <= len(shape)
        or not layout.is_sample_major(x.shape[0])
        or x.dtype not in (torch.float32, torch.float64)
        or any(t is not None and t.dtype != x.dtype for t in (weight, bias))
        or torch.is_autocast_enabled(x.device.type)
        or not x.numel()
    ):
        return None
    y = ObservedLayerNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, shape, eps, capture.probe, capture, (on_weight, on_bias), layout.batch
    )
    return capture.note(call, (on_weight, on_bias), y, layout, call.name)


def _norm(call: Call, shape: Any, bias: Tensor | None, normalise: Any) -> Any:
    x, weight = call.args[0], call.argument(2, "weight")
    layout, on_weight, on_bias = call.layout(x), call.weight(weight), call.weight(bias)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    keep = len(shape)
    if layout is None or layout.dim >= x.dim() - keep:
        return NotImplemented
    if call.layout(weight) is not None or call.layout(bias) is not None:
        return NotImplemented

    def explain(gy: Tensor, saved: Any) -> list[Any]:
        uses: list[Any] = []
        if on_weight is not None:
            normal = normalise(saved[0]).to(gy.dtype)
            uses.append((on_weight, call.spread(gy * normal, layout, shape)))
        if on_bias is not None:
            uses.append((on_bias, call.spread(gy, layout, shape)))
        return uses

    return call.observe(call.run(), explain, *([x] if on_weight is not None else []))


@rule(F.group_norm, torch.group_norm)
def group_norm(call: Call) -> Any:
    """`F.group_norm(x [B, c, ...], groups, w [c], b [c], eps)`."""
    groups, eps = call.argument(1, "num_groups"), call.argument(4, "eps", 1e-5)
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    return _channel_norm(call, weight, bias, lambda x: F.group_norm(x, groups, None, None, eps))


@rule(F.batch_norm)
def batch_norm(call: Call) -> Any:
    """`F.batch_norm(x [B, c, ...], mean, var, w [c], b [c], training, momentum, eps)`; its statistics move once."""
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    return _channel_norm(
        call, weight, bias, _with_statistics(call, F.batch_norm, call.argument(5, "training", False))
    )


@rule(F.instance_norm)
def instance_norm(call: Call) -> Any:
    """`F.instance_norm(x [B, c, ...], mean, var, w [c], b [c], use_input_stats, momentum, eps)`."""
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    fresh = call.argument(5, "use_input_stats", True)
    return _channel_norm(call, weight, bias, _with_statistics(call, F.instance_norm, fresh))


def _with_statistics(call: Call, function: Callable[..., Tensor], fresh: bool) -> Callable[[Tensor], Tensor]:
    """x̂ from the input's own statistics, or from the running ones as they are now."""
    eps = call.argument(7, "eps", 1e-5)
    kept = [
        None if fresh or t is None else t.clone()
        for t in (call.argument(1, "running_mean"), call.argument(2, "running_var"))
    ]
    return lambda x: function(x, *kept, None, None, fresh, 0.0, eps)


def _channel_norm(
    call: Call, weight: Tensor | None, bias: Tensor | None, normalise: Callable[[Tensor], Tensor]
) -> Any:
    """Weight and bias `[c]` along dimension 1 of x `[B, c, ...]`."""
    x = call.args[0]
    layout, on_weight, on_bias = call.layout(x), call.weight(weight), call.weight(bias)
    if layout is None or layout.dim != 0 or call.layout(weight) is not None or call.layout(bias) is not None:
        return NotImplemented
    along = (x.shape[1], *(1,) * (x.dim() - 2))

    def explain(gy: Tensor, saved: Any) -> list[Any]:
        uses: list[Any] = []
        if on_weight is not None:
            product = gy * normalise(saved[0]).to(gy.dtype)
            uses.append((on_weight, call.spread(product, layout, along, (x.shape[1],))))
        if on_bias is not None:
            uses.append((on_bias, call.spread(gy, layout, along, (x.shape[1],))))
        return uses

    return call.observe(call.run(), explain, *([x] if on_weight is not None else []))
