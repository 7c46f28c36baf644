"""Projected per-sample gradients: what stands in the bottleneck between two projections.

For y = x Wᵀ let sample i use the weights W + P_oᵀ C_i P_i. Then ∂L/∂C_i at C = 0 is P_o g_i P_iᵀ, and for a linear
layer that is Σ_t (P_o b_it)(P_i a_it)ᵀ: both sides are made small before they meet, and g_i is never written out
(LoGra, arXiv 2405.13954, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from assay.capture.check import check_capture
from assay.capture.factors import Apart, Dense, Directional, Factors, Lookup, Outer, Patches
from assay.capture.layout import Layout
from assay.capture.marks import Weight
from assay.capture.mode import Capture
from assay.capture.rounding import Rounded
from assay.capture.weights import Weights
from assay.errors import CoverageError, InputError
from assay.targets import undisturbed

__all__ = [
    "Sides",
    "Take",
    "projected",
    "projected_through",
    "refuse_uncovered",
    "stream_factors",
    "written_out",
]

Take = Callable[[Weight, Factors], None]
CACHED = 1 << 18  # entries of per-sample gradients that are written out at a time
ENTRIES = 1 << 22  # of a block of intermediate results, where the samples' rows lie in no regular order


@dataclass(frozen=True)
class Sides:
    """The two projections of one parameter, seen as a matrix `[rows, columns]`: its first dimension by all others.

    Args:
        shape: the parameter's shape.
        left: `[r0, rows]`; None leaves that side as it is.
        right: `[r1, columns]`; None likewise.
    """

    shape: tuple[int, ...]
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the parameter as a matrix; a vector is one column."""
        rows = self.shape[0] if self.shape else 1
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return rows, columns

    @property
    def ranks(self) -> tuple[int, int]:
        """r0 and r1."""
        rows, columns = self.matrix
        return rows if self.left is None else len(self.left), columns if self.right is None else len(
            self.right
        )

    @property
    def width(self) -> int:
        """Entries of a projected gradient."""
        return self.ranks[0] * self.ranks[1]

    def to(self, device: torch.device) -> Sides:
        """The same on a device."""
        left = None if self.left is None else self.left.to(device)
        return Sides(self.shape, left, None if self.right is None else self.right.to(device))


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
        with undisturbed(model), torch.enable_grad(), capture:
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
    if len(weight.params) == 1:
        (param,) = weight.params
        direct = _of_parameter(weight, factors, param)
        if direct is not None:
            return {param: _project(direct, sides[param])}
    if weight.pull is not None:
        dense = _dense(factors)
        if dense is not None:
            pulled = weight.pull(dense)
            return {p: _project(Dense(pulled[p]), sides[p]) for p in wanted}
    return {p: _by_directions(weight, factors, p, sides[p]) for p in wanted}


def projected_through(
    weight: Weight,
    factors: Factors,
    sides: Mapping[Parameter, Sides],
    through: Mapping[Parameter, Tensor | float],
) -> dict[Parameter, Tensor]:
    """`{parameter: [B, r0, r1]}`: P_o (D ⊙ g_i) P_iᵀ, as `projected` with a diagonal D `[*shape]` in between.

    D mixes the two sides, so that g_i is written out, a cache-full of samples at a time.

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
    if len(weight.params) == 1:
        (param,) = weight.params
        D, own = through[param], sides[param]
        assert isinstance(D, Tensor)
        direct = _of_parameter(weight, factors, param)
        if isinstance(direct, Lookup):
            D = D.reshape(own.matrix)
            scaled = Lookup(
                direct.indices, direct.b * F.embedding(direct.indices, D).to(direct.b.dtype), direct.layout
            )
            return {param: _project(scaled, own)}
        if isinstance(direct, Outer) and direct.layout.labels is None:
            return {param: _blockwise(direct, D.reshape(own.matrix), own)}
        if isinstance(direct, Dense):
            return {param: _multiplied(direct.gradients, D, own)}
    dense = written_out(weight, factors)
    return {p: _project(Dense(dense[p] * through[p]), s) for p, s in plain.items()}


def _blockwise(factors: Outer, D: Tensor, sides: Sides) -> Tensor:
    """`[B, r0, r1]`: P_o (D ⊙ Σ_t b_it a_itᵀ) P_iᵀ for D `[rows, columns]`."""
    left, right = (factors.a, factors.b) if factors.transposed else (factors.b, factors.a)
    layout, (rows, columns) = factors.layout, sides.matrix
    left = _apply(layout.grouped(left), None).reshape(layout.batch, -1, rows).mT
    right = _apply(layout.grouped(right), None).reshape(layout.batch, -1, columns)
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
    parts = []
    for start in range(0, batch, block):
        some = gradients[start : start + block]
        parts.append(_project(Dense(room[: len(some)].copy_(some).mul_(D)), sides))
    return torch.cat(parts)


def _at_once(D: Tensor) -> int:
    """Samples whose gradients are formed before they are projected: on a CPU no more than its cache holds."""
    return max(1, (CACHED if D.device.type == "cpu" else 64 * CACHED) // D.numel())


def written_out(weight: Weight, factors: Factors) -> dict[Parameter, Tensor]:
    """`{parameter: [B, *shape]}`: the per-sample gradients of the parameters behind one use.

    Raises:
        CoverageError: they answer inner products only.
    """
    dense = _dense(factors)
    if dense is None or weight.pull is None:
        raise CoverageError(
            "per-sample gradients that answer inner products only (a fallback's) cannot be written out: leave the "
            "parameters out with exclude=[...]."
        )
    return weight.pull(dense)


def _of_parameter(weight: Weight, factors: Factors, param: Parameter) -> Factors | None:
    """The factors as those of the parameter itself; None where the weight is computed from it in another way."""
    if weight.rows is None:
        return _in_own_orientation(weight, factors, param)
    rows = weight.rows
    if isinstance(factors, Apart) and rows.shape == factors.b.shape[:-1]:
        return Lookup(rows, factors.b, factors.layout)
    if isinstance(factors, Dense):  # the rows are the same for all samples
        batch = len(factors.gradients)
        return Lookup(rows.expand(batch, *rows.shape), factors.gradients, Layout(0, batch))
    return None


def _in_own_orientation(weight: Weight, factors: Factors, param: Parameter) -> Factors | None:
    """The factors as those of the parameter itself, where the used tensor is it, a cast or its transpose."""
    if isinstance(factors, (Dense, Outer, Lookup, Directional)):
        itself = param.detach()[None]
        if next(iter(weight.push({param: itself}).values()), None) is itself:
            return factors
        generator = torch.Generator(device=param.device).manual_seed(0)
        G = torch.randn(1, *param.shape, generator=generator, dtype=param.dtype, device=param.device)
        ((_, pushed),) = weight.push({param: G}).items()  # a random direction that comes back unchanged tells
        if pushed.shape == G.shape and torch.equal(pushed, G.to(pushed.dtype)):
            return factors
        if param.dim() == 2 and pushed.shape == G.mT.shape and torch.equal(pushed, G.mT.to(pushed.dtype)):
            if isinstance(factors, Outer):
                return Outer(factors.a, factors.b, factors.layout, not factors.transposed)
            if isinstance(factors, Dense):
                return Dense(factors.gradients.mT)
    return None


def _project(factors: Factors, sides: Sides) -> Tensor:
    """`[B, r0, r1]`."""
    if isinstance(factors, Outer):
        left, right = (factors.a, factors.b) if factors.transposed else (factors.b, factors.a)
        return _joined(_apply(left, sides.left), _apply(right, sides.right), factors.layout)
    if isinstance(factors, Patches):
        return factors.projected(sides.left, sides.right)
    if isinstance(factors, Lookup):
        right = _apply(factors.b, sides.right)
        if sides.left is None:
            return _scattered(factors.indices, right, factors.layout, sides.matrix[0])
        left = F.embedding(factors.indices, sides.left.t().to(right.dtype))
        return _joined(left, right, factors.layout)
    dense = _dense(factors)
    if dense is None:
        raise CoverageError(
            "per-sample gradients that answer inner products only (a fallback's) cannot be projected: leave the "
            "parameters out with exclude=[...]."
        )
    rows, columns = sides.matrix
    if columns == 1 and sides.right is None:  # a vector: one product for all samples
        return _apply(dense.reshape(len(dense), rows), sides.left)[..., None]
    g = dense.reshape(len(dense), rows, columns)
    left = g if sides.left is None else sides.left.to(g.dtype) @ g
    return left if sides.right is None else left @ sides.right.to(g.dtype).t()


def _apply(x: Tensor, matrix: Tensor | None) -> Tensor:
    """`[…, r]`: x `[…, n]` through a projection `[r, n]`, summed later in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x if matrix is None else x @ matrix.to(x.dtype).t()).to(wide)


def _joined(left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    """`[B, r0, r1]`: Σ_t left_it ⊗ right_it."""
    r0, r1 = left.shape[-1], right.shape[-1]
    if layout.labels is None:
        left, right = layout.grouped(left), layout.grouped(right)
        return left.reshape(layout.batch, -1, r0).mT @ right.reshape(layout.batch, -1, r1)
    left, right = left.movedim(layout.dim, 0), right.movedim(layout.dim, 0)
    middle = left.shape[1:-1].numel()  # named, since an expert may have no rows at all
    left, right = left.reshape(len(left), middle, r0), right.reshape(len(right), middle, r1)
    total = left.new_zeros(layout.batch, r0, r1)
    block = max(1, ENTRIES // (r0 * r1))
    for start in range(0, len(left), block):
        part = slice(start, start + block)
        pairs = left[part].mT @ right[part]  # [rows, r0, r1]
        total += layout.labelled(0, layout.labels[part]).per_sample_sum(pairs, keep=2)
    return total


def _scattered(indices: Tensor, right: Tensor, layout: Layout, rows: int) -> Tensor:
    """`[B, rows, r1]`: right `[…, r1]` added up in the rows that it was looked up from."""
    owners = layout.row_labels(indices.shape[layout.dim], indices.device)
    shape = [1] * indices.dim()
    shape[layout.dim] = -1
    owners = owners.reshape(shape).expand_as(indices).reshape(-1)
    total = right.new_zeros((layout.batch + 1) * rows, right.shape[-1])
    places = (owners % (layout.batch + 1)) * rows + indices.reshape(-1)
    total.index_add_(0, places, right.reshape(-1, right.shape[-1]))
    return total.reshape(layout.batch + 1, rows, -1)[: layout.batch]


def _dense(factors: Factors) -> Tensor | None:
    """`[B, *weight.shape]`: the gradients written out; None for factors that answer inner products only."""
    if isinstance(factors, Dense):
        return factors.gradients
    if isinstance(factors, Outer):
        left, right = (factors.a, factors.b) if factors.transposed else (factors.b, factors.a)
        return _joined(_apply(left, None), _apply(right, None), factors.layout)
    if isinstance(factors, Patches):
        g = factors.projected(None, None)  # [B, p, patch]
        return g.reshape(len(g), *factors.primals[factors.operand].shape)
    if isinstance(factors, Apart):
        return factors.written_out()
    if isinstance(factors, Directional):
        return _differentiated(factors)
    return None


def _differentiated(factors: Directional) -> Tensor:
    """`[B, *weight.shape]`: one derivative of the operation per sample."""
    layout, b = factors.layout, factors.b
    owners = layout.row_labels(b.shape[layout.dim], b.device)
    shape = [1] * b.dim()
    shape[layout.dim] = -1
    rows = []
    with torch.enable_grad():
        primals = [x.detach() for x in factors.primals]
        moved = primals[factors.operand].requires_grad_()
        y = factors.call(*primals)
        for i in range(layout.batch):
            own = b * (owners == i).reshape(shape)
            rows.append(torch.autograd.grad(y, moved, own.to(y.dtype), retain_graph=True)[0])
    return torch.stack(rows)


def _by_directions(weight: Weight, factors: Factors, param: Parameter, sides: Sides) -> Tensor:
    """`[B, r0, r1]`: inner products with every rank-one direction of the projection; the last resort."""
    rows, columns = sides.matrix
    eye = {"dtype": param.dtype, "device": param.device}
    left = torch.eye(rows, **eye) if sides.left is None else sides.left.to(**eye)  # type: ignore[call-overload]
    right = torch.eye(columns, **eye) if sides.right is None else sides.right.to(**eye)  # type: ignore[call-overload]
    others = {p: torch.zeros_like(p)[None] for p in weight.params if p is not param}
    found = []
    for row in left:  # r1 directions at once
        directions = (row[None, :, None] * right[:, None, :]).reshape(-1, *param.shape)
        rest = {p: zero.expand(len(directions), *p.shape) for p, zero in others.items()}
        pushed = weight.push({param: directions, **rest})
        found.append(torch.stack([factors.dot(part) for part in pushed.values()]).sum(0))  # [r1, B]
    return torch.stack(found).permute(2, 0, 1)
