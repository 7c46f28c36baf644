"""Operations that bring several tensors together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from assay.capture.layout import Layout
from assay.capture.track.common import Args, Known, Kwargs, agree, dimension, whole_owner

__all__ = ["CATS", "JOINS", "Join", "along_rows"]

Join = Callable[[Known, Args, Kwargs, Tensor], "Layout | None"]


def along_rows(data: Sequence[tuple[Tensor, Layout | None]], args: Args, kwargs: Kwargs, out: Tensor) -> bool:
    """Whether these are joined along the dimension in which all of them have their samples."""
    dim = dimension(args, kwargs, 1, 0, out.dim())
    return all(layout is not None and layout.dim == dim for _, layout in data)


def _cat(known: Known, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """Along another dimension the samples stay; along theirs, rows of tensors without samples belong to nobody."""
    dim = dimension(args, kwargs, 1, 0, out.dim())
    first = known[0][1]
    if dim != first.dim:
        return agree([layout for _, layout in known], out)
    tensors = args[0] if args else kwargs["tensors"]
    by_id = {id(tensor): layout for tensor, layout in known}
    if any(layout.dim != dim for layout in by_id.values()):
        return None
    labels = []
    for tensor in tensors:
        if tensor.dim() != out.dim():  # torch.cat skips empty tensors of shape [0]
            continue
        rows = tensor.shape[dim]
        owned = by_id[id(tensor)].row_labels(rows, out.device) if id(tensor) in by_id else None
        labels.append(torch.full((rows,), -1, device=out.device) if owned is None else owned)
    return first.labelled(dim, torch.cat(labels))


def _stack(known: Known, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    dim = dimension(args, kwargs, 1, 0, out.dim())
    layout = agree([layout for _, layout in known], out.select(dim, 0))
    tensors = args[0] if args else kwargs["tensors"]
    if len(known) == len(tensors):  # one sample per tensor: a loop over the samples
        owners = [whole_owner(layout, t.shape[layout.dim], t.device) for t, layout in known]
        found = [owner for owner in owners if owner is not None]
        if len(found) == len(owners) and known[0][1].batch > 1:
            return known[0][1].labelled(dim, torch.stack(found))
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
        f is not None and out.shape[f.dim] != t.shape[k.dim] for f, (t, k) in zip(found, known, strict=True)
    ):
        return None
    return agree(found, out)


def _einsum(known: Known, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """The samples' letter must be in the result; other letters do not matter."""
    if not isinstance(args[0], str):
        return None
    equation = args[0].replace(" ", "")
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    inputs, _, result = equation.partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        letters = inputs.replace(",", "").replace(".", "")
        result = "..." * ("..." in inputs) + "".join(sorted({c for c in letters if letters.count(c) == 1}))
    found: list[Layout | None] = []
    for tensor, layout in known:
        term = next(t for t, operand in zip(terms, operands, strict=True) if operand is tensor)
        spelled = _spelled(term, tensor.dim())
        target = _spelled(result, out.dim())
        letter = spelled[layout.dim]
        found.append(layout.at(target.index(letter)) if letter in target else None)
    return agree(found, out)


def _spelled(term: str, dims: int) -> list[str]:
    """One name per dimension; those of the ellipsis are numbered from the right."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = dims - len(before) - len(after)
    return [*before, *(f"...{hidden - k}" for k in range(hidden)), *after]


def _bilinear(known: Known, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """A function of inputs with the samples in equal places: the result has them there too."""
    return agree([layout if layout.dim < out.dim() - 1 else None for _, layout in known], out)


CATS = ("cat", "concat", "concatenate")
JOINS: dict[str, Join] = {
    **dict.fromkeys(CATS, _cat),
    "stack": _stack,
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm", "bmm"), _matmul),
    "einsum": _einsum,
    "bilinear": _bilinear,
}
