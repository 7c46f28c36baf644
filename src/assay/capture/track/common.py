"""What the rules of tracking share: their types, and how the layouts of several operands are brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.capture.layout import Layout

__all__ = ["Args", "Known", "Kwargs", "agree", "dimension", "labelled_by", "whole_owner"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Known = Sequence[tuple[Tensor, Layout]]


def agree(layouts: Sequence[Layout | None], out: Tensor) -> Layout | None:
    """The layout that all operands give the result, or None if they differ."""
    first = layouts[0]
    for other in layouts[1:]:
        if first is None or other is None or first.dim != other.dim:
            return None
        if not first.same_as(other, out.shape[first.dim]):
            return None
        first = first if first.labels is None else other
    return first


def dimension(args: Args, kwargs: Kwargs, position: int, default: int, dims: int) -> int:
    """The argument `dim`, counted from the left."""
    dim: int = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else default))
    return dim % max(dims, 1)


def labelled_by(layout: Layout, labels: Tensor, block: int) -> Layout | None:
    """The layout of a tensor whose dimensions from `block` on have these labels `[…]`, one dimension telling them.

    None where no single dimension does.
    """
    if labels.dim() == 0:
        return None
    for dim in range(labels.dim()):
        rows = labels.movedim(dim, 0).flatten(1) if labels.dim() > 1 else labels[:, None]
        if rows.shape[1] <= 1 or bool((rows == rows[:, :1]).all()):
            return layout.labelled(block + dim, rows[:, 0]) if rows.shape[1] else None
    return None


def whole_owner(layout: Layout, rows: int, device: torch.device) -> Tensor | None:
    """The one sample that owns all of a tensor, or None."""
    labels = layout.row_labels(rows, device)
    return labels[0] if rows and bool((labels == labels[0]).all()) else None
