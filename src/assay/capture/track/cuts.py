"""Operations that cut a tensor into several."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from assay.capture.layout import Layout
from assay.capture.track.common import Args, Kwargs
from assay.capture.track.indexing import selected

__all__ = ["CUTS", "Cut"]

Cut = Callable[[Layout, Tensor, Args, Kwargs, Tensor, int], "Layout | None"]


def _split(
    layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor, position: int
) -> Layout | None:
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % x.dim()
    if dim != layout.dim:
        return layout
    size = kwargs.get("split_size_or_sections", kwargs.get("split_size", args[1] if len(args) > 1 else None))
    rows = x.shape[dim]
    starts = (
        list(range(0, rows, size)) if isinstance(size, int) else [sum(size[:k]) for k in range(len(size))]
    )
    start = starts[position]
    return layout.labelled(dim, layout.row_labels(rows, x.device)[start : start + out.shape[dim]])


def _chunk(
    layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor, position: int
) -> Layout | None:
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % x.dim()
    if dim != layout.dim:
        return layout
    chunks = kwargs.get("chunks", args[1] if len(args) > 1 else 1)
    return layout.labelled(dim, layout.row_labels(x.shape[dim], x.device).chunk(chunks)[position])


def _unbind(
    layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor, position: int
) -> Layout | None:
    return selected(layout, x, kwargs.get("dim", args[1] if len(args) > 1 else 0), position, out)


CUTS: dict[str, Cut] = {
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "chunk": _chunk,
    **dict.fromkeys(("unbind", "__iter__"), _unbind),
}
