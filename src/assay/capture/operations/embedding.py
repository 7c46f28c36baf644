"""Embedding tables: sample i's gradient adds the output gradient to the rows that it looked up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.factors import Directional, Lookup
from assay.capture.layout import Layout
from assay.errors import CoverageError


@rule(F.embedding)
def embedding(call: Call) -> Any:
    """`F.embedding(indices [...], W [V, p], padding_idx, max_norm, ...)`."""
    indices, weight = call.args[0], call.argument(1, "weight")
    padding_idx, max_norm = call.argument(2, "padding_idx"), call.argument(3, "max_norm")
    _plain_table(call, weight, max_norm, call.argument(6, "sparse"), call.argument(5, "scale_grad_by_freq"))
    layout, mark = call.layout(indices), call.weight(weight)
    if layout is None or mark is None:
        return NotImplemented

    def explain(gy: Tensor, saved: Any) -> list[Any]:
        (index,) = saved
        if padding_idx is not None:
            padding = index == padding_idx % weight.shape[0]
            gy = gy.masked_fill(padding.unsqueeze(-1), 0)
        return [(mark, Lookup(index, gy, layout))]

    return call.observe(call.run(), explain, indices)


@rule(torch.embedding)
def raw_embedding(call: Call) -> Any:
    """`torch.embedding(W, indices, padding_idx=-1, ...)`, the spelling beneath `F.embedding`."""
    weight, indices = call.args[0], call.argument(1, "indices")
    padding_idx = call.argument(2, "padding_idx", -1)
    if call.argument(4, "sparse", False) or call.argument(3, "scale_grad_by_freq", False) or padding_idx >= 0:
        return NotImplemented
    layout, mark = call.layout(indices), call.weight(weight)
    if layout is None or mark is None:
        return NotImplemented
    return call.observe(call.run(), lambda gy, saved: [(mark, Lookup(saved[0], gy, layout))], indices)


@rule(F.embedding_bag)
def embedding_bag(call: Call) -> Any:
    """`F.embedding_bag(indices, W, offsets, ..., mode, sparse, per_sample_weights, include_last_offset, padding_idx)`.

    Bags are rows of `indices [B, n]`, or pieces of `indices [n]` that start at `offsets [B]`.
    """
    indices, weight, offsets = call.args[0], call.argument(1, "weight"), call.argument(2, "offsets")
    _plain_table(
        call,
        weight,
        call.argument(3, "max_norm"),
        call.argument(7, "sparse"),
        call.argument(5, "scale_grad_by_freq"),
    )
    mode, scales = call.argument(6, "mode", "mean"), call.argument(8, "per_sample_weights")
    padding_idx, mark = call.argument(10, "padding_idx"), call.weight(weight)
    y = call.run()
    layout = call.layout(indices if offsets is None else offsets)
    if (
        mark is None
        or layout is None
        or layout.dim
        or call.weight(scales) is not None
        or (mode == "max" and offsets is not None)
    ):
        call.capture.refuse(call, [mark] if mark else [], "this form of it is not known")
        return y
    if offsets is None:
        bag = torch.arange(len(indices), device=indices.device)[:, None].expand_as(indices).reshape(-1)
    else:
        places = torch.arange(len(indices), device=indices.device)
        bag = torch.bucketize(places, offsets[: len(y)], right=True) - 1
    padding = indices.reshape(-1) == (-1 if padding_idx is None else padding_idx % len(weight))

    def explain(gy: Tensor, saved: Any) -> list[Any]:
        index, scale = saved[0].reshape(-1), saved[1].reshape(-1, 1) if len(saved) > 1 else 1
        if mode == "max":
            first = F.embedding(saved[0], weight.detach()).masked_fill(
                padding.view_as(saved[0])[..., None], -torch.inf
            )
            chosen = saved[0].gather(1, first.argmax(1))  # [B, p] the row of W that each entry came from
            return [(mark, Directional(lambda w: w.gather(0, chosen), [weight.detach()], 0, gy, layout))]
        if mode == "mean":
            scale = 1 / torch.bincount(bag[~padding], minlength=len(gy)).clamp(min=1)[bag][:, None].to(
                gy.dtype
            )
        b = (gy[bag] * scale).masked_fill(padding[:, None], 0)
        rows = layout.labelled(0, layout.row_labels(len(gy), gy.device)[bag])
        return [(mark, Lookup(index, b, rows))]

    return call.capture.observe(
        call,
        y,
        explain,
        [indices] if scales is None else [indices, scales],
        Layout(0, layout.batch, layout.inner, layout.labels),
    )


def _plain_table(call: Call, weight: Tensor, max_norm: Any, sparse: Any, by_frequency: Any) -> None:
    """Refuse what changes a table behind autograd's back, or changes what its gradient is."""
    if max_norm is not None:
        raise CoverageError(
            f"embedding {call.capture.names_of(call.weight(weight))} has max_norm={max_norm}, which rewrites its rows "
            "during the forward pass, so that no gradient describes it; remove max_norm or name it in exclude=."
        )
    if sparse or by_frequency:
        raise CoverageError(
            f"embedding {call.capture.names_of(call.weight(weight))} uses sparse gradients or scale_grad_by_freq, "
            "which assay does not follow; switch them off or name it in exclude=."
        )
