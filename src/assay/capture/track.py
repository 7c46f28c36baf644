"""How an operation carries samples from its inputs to its output.

Every function that moves, cuts, joins or reduces dimensions has a rule here, by name. Everything else is taken to
work entry by entry or row by row: a sample stays at the dimension where it was, seen from the right where operands
broadcast. What cannot be followed becomes `MIXED`, and a parameter used there is reported, never guessed; the
start-up check compares the outcome with plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.capture.layout import Layout

__all__ = ["follow"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Rule = Callable[[Layout, Tensor, Args, Kwargs, Tensor], Layout | None]


def follow(
    name: str,
    data: Sequence[tuple[Tensor, Layout | None]],
    args: Args,
    kwargs: Kwargs,
    out: Tensor,
    position: int = 0,
) -> Layout | None:
    """The layout of `out`, the result number `position` of the function `name`.

    Args:
        name: the function's own name (`"reshape"`, `"__getitem__"`, `"cat"`).
        data: the operands that carry samples, each with its layout.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
        out: the result.
        position: which result it is, where a function returns several (`chunk`, `split`, `unbind`).

    Returns:
        The layout, or None where the samples are mixed or cannot be followed.
    """
    # per-sample gradients flow through operands with gradients only: a mask or an index has no say beside them
    voters = [(tensor, layout) for tensor, layout in data if tensor.requires_grad] or list(data)
    known = [(tensor, layout) for tensor, layout in voters if layout is not None]
    if len(known) < len(voters):
        return None
    if name in _JOINS:
        return _JOINS[name](known, args, kwargs, out)
    if name in _CUTS:
        tensor, layout = known[0]
        return _CUTS[name](layout, tensor, args, kwargs, out, position)
    if name in _MOVES:
        tensor, layout = known[0]
        return _MOVES[name](layout, tensor, args, kwargs, out)
    return _agree([_broadcast(name, layout, tensor, args, kwargs, out) for tensor, layout in known], out)


def _agree(layouts: Sequence[Layout | None], out: Tensor) -> Layout | None:
    """The layout that all operands give the result, or None if they differ."""
    first = layouts[0]
    for other in layouts[1:]:
        if first is None or other is None or first.dim != other.dim:
            return None
        if not first.same_as(other, out.shape[first.dim]):
            return None
        first = first if first.labels is None else other
    return first


# --- operations that keep every entry in its place ---------------------------------------------------------------


def _broadcast(
    name: str, layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor
) -> Layout | None:
    if out.dim() < x.dim():
        return _reduced(layout, x, args, kwargs, out)
    dim = layout.dim if name in _APPENDS else layout.dim + out.dim() - x.dim()
    return layout.at(dim) if out.shape[dim] == x.shape[layout.dim] else None


def _reduced(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None or isinstance(dims, (bool, Tensor)):
        return None
    if isinstance(dims, int):
        dims = (dims,)
    gone = {d % x.dim() for d in dims}
    if layout.dim in gone or x.dim() - len(gone) != out.dim():
        return None
    return layout.at(layout.dim - sum(d < layout.dim for d in gone))


# --- operations that move dimensions -----------------------------------------------------------------------------


def _reshape(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    return layout.reshaped(x.shape, out.shape)


def _transpose(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    names = (("dim0", "dim1"), ("axis0", "axis1"))
    pair = list(args[1:3]) + [kwargs[key] for keys in names for key in keys if key in kwargs]
    a, b = pair[0] % x.dim(), pair[1] % x.dim()
    return layout.at({a: b, b: a}.get(layout.dim, layout.dim))


def _swap_last(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    a, b = x.dim() - 2, x.dim() - 1
    return layout.at({a: b, b: a}.get(layout.dim, layout.dim)) if x.dim() >= 2 else layout


def _reverse(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    return layout.at(x.dim() - 1 - layout.dim)


def _permute(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dims = kwargs.get("dims", args[1:])
    if len(dims) == 1 and not isinstance(dims[0], int):
        dims = dims[0]
    return layout.at([d % x.dim() for d in dims].index(layout.dim))


def _movedim(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    source = kwargs.get("source", args[1] if len(args) > 1 else None)
    target = kwargs.get("destination", args[-1])
    sources = [source] if isinstance(source, int) else list(source)
    targets = [target] if isinstance(target, int) else list(target)
    order = [-1] * x.dim()
    for s, t in zip(sources, targets, strict=True):
        order[t % x.dim()] = s % x.dim()
    rest = iter(d for d in range(x.dim()) if d not in order)
    return layout.at([d if d >= 0 else next(rest) for d in order].index(layout.dim))


def _unsqueeze(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    return layout.at(layout.dim + (dim <= layout.dim))


def _squeeze(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None:
        dims = range(x.dim())
    gone = {d % x.dim() for d in ((dims,) if isinstance(dims, int) else dims)}
    gone = {d for d in gone if x.shape[d] == 1}
    if layout.dim in gone:
        return None
    return layout.at(layout.dim - sum(d < layout.dim for d in gone))


def _flip(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dims = kwargs.get("dims", args[1:] if len(args) > 2 else args[-1])
    dims = (dims,) if isinstance(dims, int) else dims
    if layout.dim not in {d % x.dim() for d in dims}:
        return layout
    return layout.labelled(layout.dim, layout.row_labels(x.shape[layout.dim], x.device).flip(0))


def _roll(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dims = kwargs.get("dims", args[2] if len(args) > 2 else None)
    if dims is None:
        return None
    dims = (dims,) if isinstance(dims, int) else dims
    return None if layout.dim in {d % x.dim() for d in dims} else layout


def _repeat(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = layout.dim + out.dim() - x.dim()
    times = out.shape[dim] // max(x.shape[layout.dim], 1)
    if times == 1:
        return layout.at(dim)
    return layout.labelled(dim, layout.row_labels(x.shape[layout.dim], x.device).repeat(times))


def _repeat_interleave(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if dim is None or repeats is None:
        return None
    if dim % x.dim() != layout.dim:
        return layout
    if isinstance(repeats, int) and layout.labels is None:
        return Layout(layout.dim, layout.batch, layout.inner * repeats)
    labels = layout.row_labels(x.shape[layout.dim], x.device)
    return layout.labelled(layout.dim, torch.repeat_interleave(labels, repeats))


def _index(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """`x[index]`: the samples' dimension only shifts, unless it is indexed itself; then its rows keep their labels."""
    items = _complete(args[1] if isinstance(args[1], tuple) else (args[1],), x.dim())
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
    return _gathered(layout, rows, item, within, block, made) if isinstance(item, Tensor) else None


def _complete(index: Args, dims: int) -> tuple[Any, ...] | None:
    """The index with a slice for every dimension that it does not mention; None for lists and bare booleans."""
    if any(isinstance(i, (list, bool)) for i in index):
        return None
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
    varies = [d for d, size in enumerate(index.shape) if size > 1] or [max(index.dim() - 1, 0)]
    if len(varies) > 1 or index.dim() == 0:
        return None
    return layout.labelled(block + made - index.dim() + varies[0], labels[index.reshape(-1)])


def _index_select(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.dim()
    if dim != layout.dim:
        return layout
    index = kwargs.get("index", args[-1])
    return layout.labelled(dim, layout.row_labels(x.shape[dim], x.device)[index])


def _select(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.dim()
    return None if dim == layout.dim else layout.at(layout.dim - (dim < layout.dim))


def _narrow(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.dim()
    if dim != layout.dim:
        return layout
    start = kwargs.get("start", args[2] if len(args) > 2 else 0)
    return layout.labelled(dim, layout.row_labels(x.shape[dim], x.device)[start : start + out.shape[dim]])


# --- operations that cut a tensor into several -------------------------------------------------------------------


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
    return _select(layout, x, args, kwargs, out)


# --- operations that join several tensors ------------------------------------------------------------------------

Known = Sequence[tuple[Tensor, Layout]]


def _cat(known: Known, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    first = known[0][1]
    if dim != first.dim:
        return _agree([layout for _, layout in known], out)
    tensors = args[0] if args else kwargs["tensors"]
    by_id = {id(tensor): layout for tensor, layout in known}
    if any(id(tensor) not in by_id or by_id[id(tensor)].dim != dim for tensor in tensors):
        return None  # rows that belong to no sample
    labels = [by_id[id(tensor)].row_labels(tensor.shape[dim], out.device) for tensor in tensors]
    return first.labelled(dim, torch.cat(labels))


def _stack(known: Known, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    layout = _agree([layout for _, layout in known], out)
    return None if layout is None else layout.at(layout.dim + (dim <= layout.dim))


def _matmul(known: Known, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """A sample axis survives as a batch dimension, as the rows of the left or the columns of the right operand."""
    left, right = (list(args) + [kwargs[k] for k in ("input", "other", "mat2") if k in kwargs])[-2:]
    found: list[Layout | None] = []
    for tensor, layout in known:
        from_right = layout.dim - tensor.dim()  # -1: last dimension
        if tensor is left and from_right == -1 and tensor.dim() > 0:
            return None  # contracted over the samples
        if tensor is right and tensor.dim() == 1:
            return None
        if tensor is right and from_right == -2 and tensor.dim() >= 2:
            return None
        shift = from_right
        if tensor is left and right.dim() == 1:
            shift = from_right + 1  # the result loses the last dimension
        if tensor is right and left.dim() == 1 and tensor.dim() > 2 and from_right < -2:
            shift = from_right + 1
        found.append(layout.at(out.dim() + shift) if -out.dim() <= shift < 0 else None)
    if any(
        new is not None and out.shape[new.dim] != t.shape[old.dim]
        for new, (t, old) in zip(found, known, strict=True)
    ):
        return None
    return _agree(found, out)


_MOVES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "transpose_"), _transpose),
    **dict.fromkeys(("mT", "mH", "adjoint"), _swap_last),
    **dict.fromkeys(("t", "T", "H", "t_"), _reverse),
    **dict.fromkeys(("permute",), _permute),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("unsqueeze", "unsqueeze_"), _unsqueeze),
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    **dict.fromkeys(("flip",), _flip),
    **dict.fromkeys(("roll",), _roll),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    "__getitem__": _index,
    "index_select": _index_select,
    "select": _select,
    "narrow": _narrow,
}
_CUTS: dict[str, Callable[[Layout, Tensor, Args, Kwargs, Tensor, int], Layout | None]] = {
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunk,
    "unbind": _unbind,
}
_JOINS: dict[str, Callable[[Known, Args, Kwargs, Tensor], Layout | None]] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _matmul),
}
# functions whose result has the operand's dimensions first and new ones behind them
_APPENDS = frozenset({"embedding", "one_hot"})
