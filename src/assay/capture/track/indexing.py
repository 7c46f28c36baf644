"""Operations that pick rows of a tensor or write rows into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.capture.layout import Layout
from assay.capture.track.common import Args, Kwargs, dimension, labelled_by

__all__ = ["PICKS", "indexed", "picked_by", "selected", "written"]

Pick = Callable[[Layout, Tensor, Args, Kwargs, Tensor], "Layout | None"]


def indexed(layout: Layout, x: Tensor, index: Any) -> Layout | None:
    """`x[index]`: the samples' dimension only shifts, unless it is indexed itself; then its rows keep their labels."""
    items = _complete(index if isinstance(index, tuple) else (index,), x.dim())
    if items is None:
        return None
    tensors = [i for i in items if isinstance(i, Tensor)]
    made = _broadcast_dims(tensors)  # dimensions that the index tensors make together
    places = [k for k, i in enumerate(items) if isinstance(i, Tensor)]
    together = not places or places[-1] - places[0] == len(places) - 1
    source, target = 0, 0 if together else made
    block = 0  # where the dimensions made by the index tensors stand in the result
    found: tuple[Any, int, int] | None = None
    for k, item in enumerate(items):
        if isinstance(item, Tensor) and together and k == places[0]:
            block, target = target, target + made
        width = _dims_used(item)
        if width and source <= layout.dim < source + width:
            found = (item, target, layout.dim - source)
        source += width
        target += item is None or isinstance(item, slice)
    if found is None:
        return None
    item, target, within = found
    rows = x.shape[layout.dim]
    if isinstance(item, slice):
        if item.indices(rows) == (0, rows, 1):
            return layout.at(target)
        return layout.labelled(target, layout.row_labels(rows, x.device)[item])
    if isinstance(item, Tensor):
        return _gathered(layout, rows, item, within, block, made)
    remaining = x.dim() - 1 + sum(i is None for i in items)
    return _owned(layout, rows, item, x.device) if remaining else None


def _owned(layout: Layout, rows: int, row: int, device: torch.device) -> Layout:
    """A tensor that is one row, all of it one sample's; the labels stand at dimension 0, one for all its rows."""
    return layout.labelled(0, layout.row_labels(rows, device)[row].reshape(1))


def _getitem(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    return _fitted(indexed(layout, x, args[1]), out)


def _fitted(layout: Layout | None, out: Tensor) -> Layout | None:
    """A single label stands for as many rows as there are; anything else must fit the result."""
    if layout is None or layout.dim >= out.dim():
        return None
    if layout.labels is None or len(layout.labels) == out.shape[layout.dim]:
        return layout
    return (
        layout.labelled(layout.dim, layout.labels.expand(out.shape[layout.dim]))
        if len(layout.labels) == 1
        else None
    )


def _complete(index: Args, dims: int) -> tuple[Any, ...] | None:
    """The index with a slice for every dimension that it does not mention; None for bare booleans."""
    if any(isinstance(i, bool) for i in index):
        return None
    index = tuple(torch.as_tensor(i) if isinstance(i, (list, range)) else i for i in index)
    rest = (slice(None),) * (dims - sum(_dims_used(i) for i in index))
    cut = next((k for k, i in enumerate(index) if i is Ellipsis), None)
    return index + rest if cut is None else index[:cut] + rest + index[cut + 1 :]


def _dims_used(i: Any) -> int:
    if i is None or i is Ellipsis:
        return 0
    return i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1


def _broadcast_dims(tensors: Sequence[Tensor]) -> int:
    return max((1 if t.dtype == torch.bool else t.dim() for t in tensors), default=0)


def _gathered(layout: Layout, rows: int, index: Tensor, within: int, block: int, made: int) -> Layout | None:
    """Rows picked by an index tensor: each keeps the label of the row that it was."""
    labels = layout.row_labels(rows, index.device)
    if index.dtype == torch.bool:  # a mask over one or several dimensions, the samples' among them
        shape = [rows if d == within else 1 for d in range(index.dim())]
        return layout.labelled(block + made - 1, labels.view(shape).expand(index.shape)[index])
    if index.dim() == 0:
        return layout.labelled(0, labels[index].reshape(1))
    return labelled_by(layout, labels[index], block + made - index.dim())


def selected(layout: Layout, x: Tensor, dim: int, row: int, out: Tensor) -> Layout | None:
    """`x.select(dim, row)`."""
    dim %= x.dim()
    if dim != layout.dim:
        return layout.at(layout.dim - (dim < layout.dim))
    return _fitted(_owned(layout, x.shape[dim], row, x.device), out) if out.dim() else None


def _select(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    row = kwargs.get("index", args[2] if len(args) > 2 else 0)
    return selected(layout, x, dimension(args, kwargs, 1, 0, x.dim()), row, out)


def _index_select(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = dimension(args, kwargs, 1, 0, x.dim())
    if dim != layout.dim:
        return layout
    index = kwargs.get("index", args[-1])
    return layout.labelled(dim, layout.row_labels(x.shape[dim], x.device)[index].reshape(-1))


def _narrow(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = dimension(args, kwargs, 1, 0, x.dim())
    if dim != layout.dim:
        return layout
    start = kwargs.get("start", args[2] if len(args) > 2 else 0)
    return layout.labelled(dim, layout.row_labels(x.shape[dim], x.device)[start : start + out.shape[dim]])


def _gather(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """`x.gather(dim, index)`: along the samples' own dimension every row keeps the label of the row that it was."""
    dim = dimension(args, kwargs, 1, -1, x.dim())
    if dim != layout.dim:
        return layout if out.shape[layout.dim] == x.shape[layout.dim] else None
    index = kwargs.get("index", kwargs.get("indices", args[-1]))
    rows = layout.row_labels(x.shape[dim], x.device)[index].movedim(dim, 0).flatten(1)  # [rows, others]
    same = rows.shape[1] > 0 and bool((rows == rows[:, :1]).all())
    return layout.labelled(dim, rows[:, 0]) if same else None


def _masked_select(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    mask = kwargs.get("mask", args[-1])
    shape = [-1 if d == layout.dim else 1 for d in range(x.dim())]
    labels = layout.row_labels(x.shape[layout.dim], x.device).view(shape)
    return layout.labelled(0, labels.expand(x.shape)[mask.expand(x.shape)])


def _nonzero(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """Where a condition holds: each hit is a row of the sample that it was found in."""
    labels = layout.row_labels(x.shape[layout.dim], x.device)
    return layout.labelled(0, labels[torch.nonzero(x)[:, layout.dim]])


def picked_by(
    name: str, layout: Layout, index: Tensor, args: Args, kwargs: Kwargs, out: Tensor
) -> Layout | None:
    """Rows of a tensor without samples, picked by an index that has them (`table[ids]`)."""
    if name == "index_select":
        return layout.at(dimension(args, kwargs, 1, 0, out.dim()))
    if name == "__getitem__":
        items = args[1] if isinstance(args[1], tuple) else (args[1],)
        if Ellipsis in [i for i in items if not isinstance(i, Tensor)] or index.dtype == torch.bool:
            return None
        places = [k for k, i in enumerate(items) if isinstance(i, Tensor)]
        dims = max(i.dim() for i in items if isinstance(i, Tensor))
        return (
            layout.at(places[0] + dims - index.dim() + layout.dim)
            if len(places) == places[-1] - places[0] + 1
            else None
        )
    return layout if name in ("gather", "take_along_dim") else None


PICKS: dict[str, Pick] = {
    "__getitem__": _getitem,
    "index_select": _index_select,
    "select": _select,
    "narrow": _narrow,
    **dict.fromkeys(("gather", "take_along_dim"), _gather),
    "masked_select": _masked_select,
    **dict.fromkeys(("nonzero", "argwhere"), _nonzero),
}


def written(
    name: str,
    into: Tensor,
    layout: Layout | None,
    value: Tensor | None,
    source: Layout | None,
    args: Args,
    kwargs: Kwargs,
) -> Layout | None:
    """The layout of `into` after rows of `value` were written to it (`into[index] = value`, `index_add_`, `scatter`).

    Args:
        name: the function's name.
        into: the tensor written to.
        layout: where the samples are in it already, if anywhere.
        value: the tensor that was written, if it was one.
        source: where the samples are in `value`.
        args: the call's positional arguments.
        kwargs: its keyword arguments.
    """
    if source is None or value is None:
        return layout
    if name == "__setitem__":
        for candidate in _candidates(into, source) if layout is None else [layout]:
            seen = _fitted(indexed(candidate, into, args[1]), value)
            if seen is not None and seen.dim == source.dim and seen.same_as(source, value.shape[source.dim]):
                return candidate
        index = args[1][0] if isinstance(args[1], tuple) else args[1]
        return _relabelled(into, layout, source, value, 0, index)
    dim = dimension(args, kwargs, 1, 0, into.dim())
    index = kwargs.get("index", args[2] if len(args) > 2 else None)
    if dim != source.dim:
        return source if into.shape[source.dim] == value.shape[source.dim] else layout
    if layout is not None and layout.labels is None:
        return layout
    if name.startswith("scatter"):
        index = index.movedim(dim, 0).flatten(1)[:, 0]
    return _relabelled(into, layout, source, value, dim, index)


def _candidates(into: Tensor, source: Layout) -> list[Layout]:
    """Regular layouts that the written tensor could have."""
    sizes = enumerate(into.shape)
    return [Layout(d, source.batch, n // source.batch) for d, n in sizes if n and n % source.batch == 0] + [
        Layout(d, source.batch, 1)
        for d, n in enumerate(into.shape)
        if n % source.batch == 0 and n > source.batch
    ]


def _relabelled(
    into: Tensor, layout: Layout | None, source: Layout, value: Tensor, dim: int, index: Any
) -> Layout | None:
    """Rows of `into` at `dim` get the labels of the rows written there; rows never written belong to nobody."""
    rows = into.shape[dim]
    if layout is not None and layout.dim != dim:
        return None
    labels = (
        torch.full((rows,), -1, device=into.device)
        if layout is None
        else layout.row_labels(rows, into.device).clone()
    )
    if isinstance(index, int):
        owners = source.row_labels(value.shape[source.dim], into.device)
        if not bool((owners == owners[0]).all()):
            return None
        labels[index] = owners[0]
    elif source.dim == dim and (isinstance(index, slice) or (isinstance(index, Tensor) and index.dim() == 1)):
        labels[index] = source.row_labels(value.shape[dim], into.device)
    else:
        return None
    return source.labelled(dim, labels)
