"""Projected per-sample gradients: what stands in the bottleneck between two projections.

For y = x Wᵀ let sample i use the weights W + P_oᵀ C_i P_i. Then ∂L/∂C_i at C = 0 is P_o g_i P_iᵀ, and for a linear
layer that is Σ_t (P_o b_it)(P_i a_it)ᵀ: both sides are made small before they meet, and g_i is never written out
(LoGra, arXiv 2405.13954, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from assay.capture.check import check_capture
from assay.capture.factors import Dense, Factors, Lookup, Outer, Patches
from assay.capture.forms import applied, dense, joined, scattered
from assay.capture.marks import Weight
from assay.capture.mode import Capture
from assay.capture.narrowed import narrowed, of_parameter, owned
from assay.capture.rounding import Rounded
from assay.capture.sides import Sides
from assay.capture.weights import Weights
from assay.errors import CoverageError, InputError
from assay.targets import undisturbed

__all__ = [
    "Take",
    "projected",
    "projected_through",
    "refuse_uncovered",
    "small_projected",
    "small_projected_twice",
    "small_uses",
    "stream_factors",
    "written_out",
]

Take = Callable[[Weight, Factors], None]
CACHED = 1 << 18  # entries of per-sample gradients that are written out at a time


def stream_factors(
    model: Module,
    weights: Weights,
    loss_fn: Callable[[Module, object], Tensor],
    batch: object,
    size: int,
    take: Take,
    *,
    check: bool = False,
) -> None:
    """One forward and backward pass in evaluation mode; `.grad` of the parameters is neither formed nor touched.

    Args:
        model: the model.
        weights: the parameters whose per-sample gradients are wanted.
        loss_fn: `loss_fn(model, batch)` returns a scalar.
        batch: what it takes.
        size: B, the number of rows of dimension 0.
        take: called with each weight and its factors.
        check: compare the capture with plain autograd on this batch first.

    Raises:
        InputError: the loss is no scalar with a gradient, or the model received another number of rows.
        CoverageError: a parameter is used in a way that has no exact rule.
    """
    capture = Capture(weights, size, strict=True)  # torch's own kernels: no weight gradient is asked of them
    due = check

    def counted(weight: Weight, factors: Factors, part: slice) -> None:  # whole: nothing is kept
        if weights.counts(weight, factors):
            take(weight, factors)

    capture.takes.append(counted)

    def enter(module: Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal due
        if capture.paused:
            return
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        rows = [len(x) for x in tensors if x.dim()]
        if rows and size not in rows:
            raise InputError(
                f"{size} examples were announced, but the model received tensors of "
                f"{', '.join(map(str, dict.fromkeys(rows)))} rows; give one id per row of dimension 0."
            )
        for tensor in tensors:
            capture.enter(tensor)
        if due and size > 1:
            due, capture.paused = False, True
            try:
                check_capture(model, args, kwargs, weights, size)
            finally:
                capture.paused = False
            refuse_uncovered(weights)

    hook = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with undisturbed(model), torch.enable_grad(), capture.marking(), capture:
            loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise InputError(
                    f"loss_fn(model, batch) must return a scalar tensor, not {shape}; return its mean or its sum."
                )
            if not loss.requires_grad or not capture.uses:
                raise InputError(
                    "the loss does not depend on the parameters that are watched: return a loss of the model's "
                    "outputs, with gradients enabled."
                )
            torch.autograd.grad(loss.reshape(()), capture.probe)
    finally:
        hook.remove()


def refuse_uncovered(weights: Weights) -> None:
    """The fallback at the model's boundary answers inner products only: it has nothing to project."""
    if weights.uncovered:
        names = [weights.names[param] for param in weights.uncovered]
        raise CoverageError(
            f"parameter {', '.join(names)} has no per-sample gradients that can be projected "
            f"({next(iter(weights.uncovered.values()))}). Pass exclude={names} to leave it out (scores are then "
            "partial), or rewrite the operation."
        )


def projected(weight: Weight, factors: Factors, sides: Mapping[Parameter, Sides]) -> dict[Parameter, Tensor]:
    """`{parameter: [B, r0, r1]}`: P_o g_i P_iᵀ of the parameters behind one use, for those that `sides` names."""
    wanted = [param for param in weight.params if param in sides]
    if not wanted:
        return {}
    if isinstance(factors, Rounded):
        factors = factors.widened()
    own = _of_parameters(weight, factors, wanted)
    if own is None:
        return {p: _by_directions(weight, factors, p, sides[p]) for p in wanted}
    return {p: _project(own[p], sides[p]) for p in wanted}


def _of_parameters(
    weight: Weight, factors: Factors, wanted: Sequence[Parameter]
) -> dict[Parameter, Factors] | None:
    """The gradients of the parameters behind a use; None where they answer inner products only."""
    if len(weight.params) == 1:
        (param,) = weight.params
        direct = of_parameter(weight, factors, param)
        if direct is not None:
            return {param: direct}
    g = dense(factors) if weight.pull is not None else None
    if g is None or weight.pull is None:
        return None
    pulled = weight.pull(g)
    return {p: Dense(pulled[p]) for p in wanted}


def projected_through(
    weight: Weight,
    factors: Factors,
    sides: Mapping[Parameter, Sides],
    through: Mapping[Parameter, Tensor | float],
) -> dict[Parameter, Tensor]:
    """`{parameter: [B, r0, r1]}`: P_o (D ⊙ g_i) P_iᵀ, as `projected` with a diagonal D `[*shape]` in between.

    D mixes the two sides, so that what the projections read of g_i is written out, a cache-full of samples at a time.

    Args:
        weight: the use's weight.
        factors: its per-sample gradients.
        sides: the projections.
        through: D by parameter; a number is a multiple of the identity. Parameters that it lacks are left out.
    """
    if isinstance(factors, Rounded):  # what is written out is widened block by block
        factors = factors.factors if isinstance(factors.factors, Dense) else factors.widened()
    plain = {p: sides[p] for p in weight.params if p in sides and p in through}
    if all(not isinstance(through[p], Tensor) for p in plain):
        return {p: part * through[p] for p, part in projected(weight, factors, plain).items()}
    own = _of_parameters(weight, factors, list(plain))
    if own is None:
        _refuse_writing_out()
    found = {}
    for p, s in plain.items():
        small = narrowed(own[p], s)
        if small is None:
            _refuse_writing_out()
        found[p] = small_projected(small, s, through[p])
    return found


def small_uses(
    weight: Weight, factors: Factors, sides: Mapping[Parameter, Sides]
) -> dict[Parameter, Factors]:
    """`{parameter: …}`: what the projections read of the parameters behind one use, in memory of its own.

    Args:
        weight: the use's weight.
        factors: its per-sample gradients.
        sides: the projections; parameters that they lack are left out.

    Raises:
        CoverageError: they answer inner products only.
    """
    wanted = [param for param in weight.params if param in sides]
    own = _of_parameters(weight, factors, wanted) if wanted else {}
    found: dict[Parameter, Factors] = {}
    for p in wanted:
        small = None if own is None else narrowed(own[p], sides[p])
        kept = None if small is None else owned(small, sides[p].within.matrix)
        if kept is None:
            _refuse_writing_out()
        found[p] = kept
    return found


def small_projected(factors: Factors, sides: Sides, through: Tensor | float = 1.0) -> Tensor:
    """`[B, r0, r1]`: P_o (D ⊙ g_i) P_iᵀ of what the projections read of a parameter's gradients.

    Args:
        factors: as `narrowed` gives them.
        sides: the parameter's projections.
        through: D `[*shape]`, or what is read of it, `[s0, s1]`; a number is a multiple of the identity.
    """
    within = sides.within
    if not isinstance(through, Tensor):
        found = _project(factors, within)
        return found if through == 1.0 else found * through
    D = sides.entries_of(through)
    if isinstance(factors, Lookup):
        scaled = factors.b * F.embedding(factors.indices, D).to(factors.b.dtype)
        return _project(replace(factors, b=scaled), within)
    if isinstance(factors, Outer) and factors.layout.labels is None:
        return _blockwise(factors, D, within)
    g = dense(factors)
    if g is None:
        _refuse_writing_out()
    return _multiplied(g.reshape(len(g), *D.shape), D, within)


def small_projected_twice(
    factors: Factors, sides: Sides, others: Sides, through: Tensor | float
) -> tuple[Tensor, Tensor]:
    """`[B, r0, r1]` each: P g_i and Q (D ⊙ g_i) of what both read of a parameter's gradients.

    Args:
        factors: as `narrowed` gives them.
        sides: P.
        others: Q, which reads the same entries in the same order.
        through: D `[*shape]`, or what is read of it; a number is a multiple of the identity.
    """
    if not isinstance(factors, Dense) or sides.entries is None or not isinstance(through, Tensor):
        return small_projected(factors, sides), small_projected(factors, others, through)
    g = factors.gradients
    parts = sides.dealt(g.reshape(len(g), *sides.within.matrix))  # one pass over the entries for both
    D = sides.entries_of(through)
    return sides.summed(parts), others.summed(parts, D)


def _refuse_writing_out() -> NoReturn:
    raise CoverageError(
        "per-sample gradients that answer inner products only (a fallback's) cannot be written out: leave the "
        "parameters out with exclude=[...]."
    )


def _refuse_projecting() -> NoReturn:
    raise CoverageError(
        "per-sample gradients that answer inner products only (a fallback's) cannot be projected: leave the "
        "parameters out with exclude=[...]."
    )


def _blockwise(factors: Outer, D: Tensor, sides: Sides) -> Tensor:
    """`[B, r0, r1]`: P_o (D ⊙ Σ_t b_it a_itᵀ) P_iᵀ for D `[rows, columns]`."""
    left, right = (factors.a, factors.b) if factors.transposed else (factors.b, factors.a)
    layout, (rows, columns) = factors.layout, sides.matrix
    left = applied(layout.grouped(left), None).reshape(layout.batch, -1, rows).mT
    right = applied(layout.grouped(right), None).reshape(layout.batch, -1, columns)
    block = _at_once(D)
    parts = []
    for start in range(0, layout.batch, block):
        part = slice(start, start + block)
        parts.append(_project(Dense((left[part] @ right[part]).mul_(D)), sides))  # [samples, rows, columns]
    return torch.cat(parts)


def _multiplied(gradients: Tensor, D: Tensor, sides: Sides) -> Tensor:
    """`[B, r0, r1]`: P_o (D ⊙ g_i) P_iᵀ for g `[B, *shape]`, which may belong to others and stays as it is."""
    block, batch = _at_once(D), len(gradients)
    wide = torch.promote_types(gradients.dtype, D.dtype)
    room = torch.empty(min(block, batch), *D.shape, dtype=wide, device=D.device)
    found = room.new_empty(batch, *sides.ranks)
    for start in range(0, batch, block):
        some = gradients[start : start + block]
        # copied, since a projection that keeps all of it is the room itself
        found[start : start + block] = _project(Dense(room[: len(some)].copy_(some).mul_(D)), sides)
    return found


def _at_once(D: Tensor) -> int:
    """Samples whose gradients are formed before they are projected: on a CPU no more than its cache holds."""
    return max(1, (CACHED if D.device.type == "cpu" else 64 * CACHED) // D.numel())


def written_out(weight: Weight, factors: Factors) -> dict[Parameter, Tensor]:
    """`{parameter: [B, *shape]}`: the per-sample gradients of the parameters behind one use.

    Raises:
        CoverageError: they answer inner products only.
    """
    g = dense(factors)
    if g is None or weight.pull is None:
        _refuse_writing_out()
    return weight.pull(g)


def _project(factors: Factors, sides: Sides) -> Tensor:
    """`[B, r0, r1]`."""
    if isinstance(factors, Patches) and sides.entries is None:
        sides = sides.whole()  # its patches are never laid out
        return factors.projected(sides.left, sides.right)
    if sides.narrow:
        small = narrowed(factors, sides)
        if small is None:
            _refuse_projecting()
        return _project(small, sides.within)
    if isinstance(factors, Outer) and sides.entries is None:
        left, right = (factors.a, factors.b) if factors.transposed else (factors.b, factors.a)
        return joined(applied(left, sides.left), applied(right, sides.right), factors.layout)
    if isinstance(factors, Lookup):
        right = applied(factors.b, sides.right)
        if sides.left is None:
            g = scattered(factors.indices, right, factors.layout, sides.matrix[0])
            return g if sides.entries is None else sides.applied(g)
        left = F.embedding(factors.indices, sides.left.t().to(right.dtype))
        return joined(left, right, factors.layout)
    written = dense(factors)
    if written is None:
        _refuse_projecting()
    rows, columns = sides.matrix
    if columns == 1 and sides.right is None and sides.entries is None:  # a vector: one product for all
        return applied(written.reshape(len(written), rows), sides.left)[..., None]
    return sides.applied(written.reshape(len(written), rows, columns))


def _by_directions(weight: Weight, factors: Factors, param: Parameter, sides: Sides) -> Tensor:
    """`[B, r0, r1]`: inner products with every row of the projection; the last resort."""
    others = {p: torch.zeros_like(p)[None] for p in weight.params if p is not param}
    found = []
    for directions in sides.directions(param):  # r1 at once
        rest = {p: zero.expand(len(directions), *p.shape) for p, zero in others.items()}
        pushed = weight.push({param: directions, **rest})
        found.append(torch.stack([factors.dot(part) for part in pushed.values()]).sum(0))  # [r1, B]
    return torch.stack(found).permute(2, 0, 1)
