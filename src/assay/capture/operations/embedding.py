"""Embedding tables: sample i's gradient adds the output gradient to the rows that it looked up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.call import Call, rule
from assay.capture.factors import Lookup
from assay.errors import CoverageError


@rule(F.embedding)
def embedding(call: Call) -> Any:
    """`F.embedding(indices [...], W [V, p], padding_idx, max_norm, ...)`."""
    indices, weight = call.args[0], call.argument(1, "weight")
    padding_idx, max_norm = call.argument(2, "padding_idx"), call.argument(3, "max_norm")
    if max_norm is not None:
        raise CoverageError(
            f"embedding {call.capture.names_of(call.weight(weight))} has max_norm={max_norm}, which rewrites its rows "
            "during the forward pass, so that no gradient describes it; remove max_norm or name it in exclude=."
        )
    if call.argument(6, "sparse", False) or call.argument(5, "scale_grad_by_freq", False):
        raise CoverageError(
            f"embedding {call.capture.names_of(call.weight(weight))} uses sparse gradients or scale_grad_by_freq, "
            "which assay does not follow; switch them off or name it in exclude=."
        )
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
