"""What the capture knows of a tensor: it carries samples, it is a function of parameters alone, or neither."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.capture.layout import Layout

__all__ = ["CONSTANT", "MIXED", "Constant", "Data", "Directions", "Mark", "Weight"]

# parameter -> [targets, *parameter.shape]: the direction G along which per-sample gradients are measured
Directions = Mapping[Parameter, Tensor]


@dataclass(frozen=True, eq=False)
class Data:
    """A tensor that depends on the samples.

    Args:
        layout: where they are; None where its entries mix them (a loss, a mean).
        tokens: where the positions of the sequences are, if that is followed and known.
    """

    layout: Layout | None
    tokens: Layout | None = None


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that depends on neither samples nor trainable parameters."""


@dataclass(eq=False)
class Weight:
    """A tensor computed from parameters (and constants) alone: the parameter itself, its transpose, `1 + w`, ….

    A sample that used the parameter moved by c·G used this tensor moved by c·G', with G' the derivative of the
    computation along G; `push` is that derivative. So a rule for an operation needs to know only G'.

    Args:
        params: the parameters that it depends on.
        push: from directions of the parameters to `{group: [targets, *shape]}`, one entry per parameter group.
        pull: the adjoint of `push`, from gradients `[B, *shape]` of this tensor to those of its parameters; None
            where only inner products are to be had.
        derived: whether it is not the parameter itself.
        rows: where it is a parameter's rows `param[rows]` looked up in an embedding: which.
        operands: what a derived weight was computed from, which `push` and `pull` read.
    """

    params: tuple[Parameter, ...]
    push: Callable[[Directions], dict[int, Tensor]]
    pull: Callable[[Tensor], dict[Parameter, Tensor]] | None = None
    operations: set[str] = field(default_factory=set)
    derived: bool = True
    rows: Tensor | None = None
    operands: list[Tensor] = field(default_factory=list)


Mark = Data | Constant | Weight

CONSTANT = Constant()
MIXED = Data(None)


def leaf(param: Parameter, group: int) -> Weight:
    """The mark of a parameter itself."""
    return Weight(
        (param,),
        lambda directions: {group: directions[param]},
        lambda gradients: {param: gradients},
        derived=False,
    )


# functions that are linear in their one operand that is a weight: the derivative along G is the function of G
LINEAR = frozenset(
    ("t", "T", "mT", "transpose", "permute", "reshape", "view", "flatten", "unflatten", "expand", "expand_as",
     "unsqueeze", "squeeze", "contiguous", "clone", "narrow", "select", "__getitem__", "embedding")
)  # fmt: skip


def derive(
    call: Callable[..., Tensor], operands: list[Tensor], weights: dict[int, Weight], linear: bool = False
) -> Weight:
    """The mark of `call(*operands)`, whose operands at the keys of `weights` carry those marks.

    No operand depends on a sample. `linear` says that the one weight among them is moved about and no more.

    The derivative is taken by forward-mode differentiation when a direction is pushed, so that an operation which
    nobody looks at costs nothing.
    """
    params = tuple(dict.fromkeys(p for mark in weights.values() for p in mark.params))
    primals = [operand.detach() for operand in operands]

    def moved(directions: Directions) -> dict[int, Tensor]:
        ((place, mark),) = weights.items()
        return {
            group: torch.stack(
                [call(*(G.to(x.dtype) if i == place else x for i, x in enumerate(primals))) for G in tangents]
            )
            for group, tangents in mark.push(directions).items()
        }

    def push(directions: Directions) -> dict[int, Tensor]:
        pushed = {i: mark.push(directions) for i, mark in weights.items()}
        groups = sorted({group for tangents in pushed.values() for group in tangents})
        return {
            group: _jvp(call, primals, {i: t[group] for i, t in pushed.items() if group in t})
            for group in groups
        }

    def pull(gradients: Tensor) -> dict[Parameter, Tensor]:
        found: dict[Parameter, Tensor] = {}
        for i, part in _pulled_back(call, primals, list(weights), gradients).items():
            below = weights[i].pull
            assert below is not None  # a derived weight comes from parameters and derived weights alone
            for param, g in below(part).items():
                found[param] = found[param] + g if param in found else g
        return found

    return Weight(params, moved if linear else push, pull, operands=primals)


_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def rows_looked_up(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], weights: Mapping[int, Weight]
) -> Tensor | None:
    """The indices of an embedding that looks rows of one parameter up, and nothing else."""
    if func is not F.embedding or len(weights) != 1 or next(iter(weights.values())).derived:
        return None
    given = dict(zip(_EMBEDDING, args, strict=False)) | dict(kwargs)
    special = (given.get(name) for name in ("max_norm", "scale_grad_by_freq", "sparse"))
    return None if any(special) or given.get("padding_idx") is not None else given["input"]


def _pulled_back(
    call: Callable[..., Tensor], primals: list[Tensor], positions: list[int], gradients: Tensor
) -> dict[int, Tensor]:
    """`{operand: [B, *operand.shape]}`: gradients `[B, *shape]` of `call(*primals)` taken back to its operands."""
    with torch.enable_grad():
        moved = {i: primals[i].detach().requires_grad_() for i in positions}
        y = call(*(moved.get(i, primal) for i, primal in enumerate(primals)))
        rows = [
            torch.autograd.grad(y, list(moved.values()), g.to(y.dtype), retain_graph=True) for g in gradients
        ]
    return {i: torch.stack(column) for i, column in zip(moved, zip(*rows, strict=True), strict=True)}


def _jvp(call: Callable[..., Tensor], primals: list[Tensor], tangents: dict[int, Tensor]) -> Tensor:
    """`[targets, *shape]`: the derivative of `call` along the tangents `[targets, *operand.shape]`."""
    targets = next(iter(tangents.values())).shape[0]
    return torch.stack(
        [
            directional_derivative(call, primals, {i: t[n] for i, t in tangents.items()})
            for n in range(targets)
        ]
    )


def directional_derivative(
    call: Callable[..., Tensor], primals: list[Tensor], tangents: dict[int, Tensor]
) -> Tensor:
    """The derivative of `call(*primals)` along one tangent for each operand named.

    By forward-mode differentiation; where an operation has no forward-mode formula, by differentiating its backward
    pass, which is linear in the output gradient (the double-backward trick). The fused kernels of attention have
    neither, so it is computed without them.
    """
    tangents = {i: tangent.to(primals[i].dtype) for i, tangent in tangents.items()}
    load_forward_mode()
    with sdpa_kernel(SDPBackend.MATH):
        return _derivative(call, primals, tangents)


def _derivative(call: Callable[..., Tensor], primals: list[Tensor], tangents: dict[int, Tensor]) -> Tensor:
    try:
        with torch.no_grad(), forward_ad.dual_level():
            duals = list(primals)
            for i, tangent in tangents.items():  # contiguous: an expanded tensor cannot carry a tangent
                duals[i] = forward_ad.make_dual(primals[i].contiguous(), tangent.contiguous())  # type: ignore[no-untyped-call]
            primal, tangent = forward_ad.unpack_dual(call(*duals))  # type: ignore[no-untyped-call]
        return torch.zeros_like(primal) if tangent is None else tangent
    except NotImplementedError:
        return _double_backward(call, primals, tangents)


@lru_cache(maxsize=1)
def load_forward_mode() -> None:
    """What torch loads at the first forward-mode derivative, without the deprecation warning of its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _double_backward(
    call: Callable[..., Tensor], primals: list[Tensor], tangents: dict[int, Tensor]
) -> Tensor:
    with torch.enable_grad():
        moved = {i: primals[i].detach().requires_grad_() for i in tangents}
        y = call(*(moved.get(i, primal) for i, primal in enumerate(primals)))
        v = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, list(moved.values()), v, create_graph=True)  # Jᵀv, linear in v
        (tangent,) = torch.autograd.grad(pulled, v, [tangents[i] for i in moved])
    return tangent.detach()
