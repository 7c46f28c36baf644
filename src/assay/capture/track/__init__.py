"""How an operation carries samples from its inputs to its output.

Every function that moves, picks, writes, cuts, joins or reduces dimensions has a rule here, by name. Everything else
is taken to work entry by entry or row by row: a sample stays at the dimension where it was, seen from the right where
operands broadcast. What cannot be followed becomes `MIXED`, and a parameter used there is reported, never guessed;
the start-up check compares the outcome with plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from assay.capture.layout import Layout
from assay.capture.track.common import Args, Kwargs, agree
from assay.capture.track.cuts import CUTS
from assay.capture.track.indexing import PICKS, picked_by, written
from assay.capture.track.joins import CATS, JOINS, along_rows
from assay.capture.track.moves import MOVES

__all__ = ["ALONG", "follow", "written"]


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
    if name.startswith(_WRITES):
        return _write(name, data, args, kwargs, out)
    if name == "where" and len(args) == 1:
        name = "nonzero"
    voters = _voters(name, data, args)
    if name in CATS and along_rows(voters, args, kwargs, out):  # all of them say whose rows they bring
        voters = [(tensor, layout) for tensor, layout in data if layout is not None]
    known = [(tensor, layout) for tensor, layout in voters if layout is not None]
    if len(known) < len(voters):
        return None
    if not out.dim():
        return None
    if name in JOINS:
        return JOINS[name](known, args, kwargs, out)
    tensor, layout = known[0]
    if name in CUTS:
        return CUTS[name](layout, tensor, args, kwargs, out, position)
    if name in MOVES:
        return MOVES[name](layout, tensor, args, kwargs, out)
    if name in PICKS and args and tensor is not args[0]:
        return picked_by(name, layout, tensor, args, kwargs, out)
    if name in PICKS:
        return PICKS[name](layout, tensor, args, kwargs, out)
    if len(known) == 1:
        return _broadcast(name, layout, tensor, args, kwargs, out)
    return agree([_broadcast(name, layout, tensor, args, kwargs, out) for tensor, layout in known], out)


def _voters(
    name: str, data: Sequence[tuple[Tensor, Layout | None]], args: Args
) -> Sequence[tuple[Tensor, Layout | None]]:
    """The operands that decide: per-sample gradients flow through those with gradients; a mask or an index has no say.

    What is picked from is what is picked, whatever the index.
    """
    if len(data) == 1:
        return data
    if name in PICKS and args:
        picked = [(tensor, layout) for tensor, layout in data if tensor is args[0]]
        if picked:
            return picked
    for wanted in (lambda t: t.requires_grad, Tensor.is_floating_point):
        chosen = [(tensor, layout) for tensor, layout in data if wanted(tensor)]
        if chosen:
            return chosen
    return data


def _write(
    name: str, data: Sequence[tuple[Tensor, Layout | None]], args: Args, kwargs: Kwargs, out: Tensor
) -> Layout | None:
    """Rows written into the first operand."""
    into = args[0]
    layouts = [
        (tensor, layout) for tensor, layout in data if tensor is not into and tensor.is_floating_point()
    ]
    (value, source) = layouts[-1] if layouts else (None, None)
    layout = next((layout for tensor, layout in data if tensor is into), None)
    if value is not None and source is None and value.requires_grad:
        return None
    if layout is None and source is None:  # a number written where an index of the samples says
        alike = [(i, where) for i, where in data if i is not into and where and i.dim() == into.dim()]
        return next((where for i, where in alike if i.shape[where.dim] == into.shape[where.dim]), None)
    found = written(name, into, layout, value, source, args, kwargs)
    return found if found is None or found.dim < out.dim() else None


# --- operations that keep every entry in its place ---------------------------------------------------------------


def _broadcast(
    name: str, layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor
) -> Layout | None:
    if out.dim() < x.dim():
        return _reduced(name, layout, x, args, kwargs, out)
    if name in ALONG and _along(name, x, args, kwargs) == layout.dim:
        return None
    dim = layout.dim if name in _APPENDS else layout.dim + out.dim() - x.dim()
    return layout.at(dim) if out.shape[dim] == x.shape[layout.dim] else None


def _along(name: str, x: Tensor, args: Args, kwargs: Kwargs) -> int | None:
    dim = kwargs.get("dim", args[ALONG[name]] if len(args) > ALONG[name] else None)
    return dim % x.dim() if isinstance(dim, int) and not isinstance(dim, bool) and x.dim() else None


def _reduced(name: str, layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    position = 2 if name in _SECOND else 1
    dims = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else None))
    if dims is None or isinstance(dims, (bool, float, Tensor)):
        return None
    if isinstance(dims, int):
        dims = (dims,)
    gone = {d % x.dim() for d in dims}
    if layout.dim in gone or x.dim() - len(gone) != out.dim():
        return None
    return layout.at(layout.dim - sum(d < layout.dim for d in gone))


# functions whose result has the operand's dimensions first and new ones behind them
_APPENDS = frozenset({"embedding", "one_hot", "diag_embed", "view_as_real"})
# functions that write rows into their first operand
_WRITES = ("__setitem__", "index_add", "index_copy", "scatter")
# functions whose second argument is not the dimension
_SECOND = frozenset({"norm", "quantile", "nanquantile", "kthvalue"})
# functions that run along a dimension and keep its size, with the position of the argument `dim`
ALONG = {
    **dict.fromkeys(
        ("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"), 1
    ),
    **dict.fromkeys(("sort", "argsort", "glu"), 1),
    **dict.fromkeys(("normalize", "renorm", "fft", "ifft"), 2),
}
