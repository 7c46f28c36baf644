"""Operations that move, add, drop or repeat dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from assay.capture.layout import Layout
from assay.capture.track.common import Args, Kwargs

__all__ = ["MOVES", "Move"]

Move = Callable[[Layout, Tensor, Args, Kwargs, Tensor], "Layout | None"]


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


def _unfold(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """`x.unfold(dim, size, step)` appends a dimension; `F.unfold(x [B, c, h, w])` gives `[B, c·k, l]`."""
    if out.dim() != x.dim() + 1:
        return layout if layout.dim == 0 else None
    dim = kwargs.get("dimension", args[1] if len(args) > 1 else 0) % x.dim()
    return None if dim == layout.dim else layout


def _diagonal(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dims = [kwargs.get(f"dim{k}", args[1 + k] if len(args) > 1 + k else k - 1) % x.dim() for k in (1, 2)]
    if not kwargs.keys() & {"dim1", "dim2"} and len(args) < 3:
        dims = [0, 1]
    return None if layout.dim in dims else layout.at(layout.dim - sum(d < layout.dim for d in dims))


def _view_as_complex(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    return layout if layout.dim < out.dim() else None


def _as_strided(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """Known where the first dimension is left as it is and no row reaches into the next."""
    if layout.dim or not out.dim() or (out.shape[0], out.stride(0)) != (x.shape[0], x.stride(0)):
        return None
    reach = sum((size - 1) * stride for size, stride in zip(out.shape[1:], out.stride()[1:], strict=True))
    return layout if reach < out.stride(0) and out.storage_offset() == x.storage_offset() else None


def _pack(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """`_pack_padded_sequence(x, lengths, batch_first)`: step by step, the rows of the sequences still running."""
    batch_dim = 0 if kwargs.get("batch_first", args[2] if len(args) > 2 else False) else 1
    lengths = kwargs.get("lengths", args[1] if len(args) > 1 else None)
    if layout.dim != batch_dim or lengths is None or out.dim() == 1:
        return None
    labels = layout.row_labels(x.shape[batch_dim], x.device)
    running = (
        lengths.to(x.device)[None] > torch.arange(int(lengths.max()), device=x.device)[:, None]
    )  # [T, B]
    return layout.labelled(0, labels.expand(running.shape)[running])


def _unpack(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """`_pad_packed_sequence(data, batch_sizes, batch_first, …)`: the first step's rows name the sequences."""
    batch_dim = 0 if args[2] else 1
    if layout.dim != 0 or out.dim() == 1:
        return None
    return layout.labelled(batch_dim, layout.row_labels(len(x), x.device)[: out.shape[batch_dim]])


MOVES: dict[str, Move] = {
    "_pack_padded_sequence": _pack,
    "_pad_packed_sequence": _unpack,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "transpose_"), _transpose),
    **dict.fromkeys(("mT", "mH", "adjoint"), _swap_last),
    **dict.fromkeys(("t", "T", "H", "t_"), _reverse),
    "permute": _permute,
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("unsqueeze", "unsqueeze_"), _unsqueeze),
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    "flip": _flip,
    "roll": _roll,
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    "unfold": _unfold,
    "view_as_complex": _view_as_complex,
    "as_strided": _as_strided,
    "diagonal": _diagonal,
}
