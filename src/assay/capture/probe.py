"""A score is the gradient of a probe (the autograd side of the capture).

For y = x Wᵀ let sample i use the weights W + c_i·G. Then ∂L/∂c_i at c = 0 is ⟨g_i, G⟩. Each use of a weight takes an
extra input `probe` `[groups, targets, B]`, zeros that nothing reads, and returns the per-sample inner products of
this use as the probe's gradient; autograd sums them over all uses. Nothing is stored on the side, so the mechanism
composes with activation checkpointing, autocast and accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.contraction import Blocks, per_sample_gradients, weight_gradient_and_products
from assay.capture.factors import Dense, Factors, Outer
from assay.capture.layout import Layout
from assay.capture.marks import Weight
from assay.capture.recorder import Recorder
from assay.capture.rounding import Rounded
from assay.errors import CoverageError

__all__ = ["Explain", "Observe", "ObserveInPlace", "ObservedLinear", "Use", "once"]

# what the gradient of an operation's output and its saved tensors say of the weights it used
Explain = Callable[[Tensor, Sequence[Tensor]], Sequence[tuple[Weight, Factors]]]


@dataclass(frozen=True)
class Use:
    """One use of weights by one operation: how its factored gradients come out, and who wants them."""

    recorder: Recorder
    explain: Explain


class Observe(torch.autograd.Function):
    """Passes `y` on; in the backward pass reads the output's gradient and answers through the probe."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, use: Use, *saved: Tensor) -> Tensor:
        """`y` itself, under a new autograd node."""
        ctx.use, ctx.like = use, probe
        ctx.save_for_backward(*saved)
        return _alias(y)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient unchanged for `y`, the scores for the probe."""
        saved = ctx.saved_tensors  # under the capture: reading them may run a checkpoint's forward pass again
        recorder = ctx.use.recorder
        if recorder.idle:
            return (once(gy, recorder), torch.zeros_like(ctx.like), None, *(None for _ in saved))
        with torch._C.DisableTorchFunction(), torch.autocast(gy.device.type, enabled=False), torch.no_grad():
            try:
                scores = recorder.record(ctx.use.explain(gy, saved), ctx.like)
            except Exception as error:
                recorder.fault("in the backward pass", error)
                scores = torch.zeros_like(ctx.like)
        return (once(gy, recorder), scores, None, *(None for _ in saved))


class ObserveInPlace(torch.autograd.Function):
    """`Observe` for a function that wrote its result into `y`: the caller goes on using that very tensor."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, use: Use, *saved: Tensor) -> Tensor:
        """`y` itself, its history extended."""
        ctx.mark_dirty(y)
        ctx.use, ctx.like = use, probe
        ctx.save_for_backward(*saved)
        return y

    backward = Observe.backward


class ObservedLinear(torch.autograd.Function):
    """y = x Wᵀ + b that forms the weight gradient itself, so that the scores ride on the same GEMM."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        probe: Tensor,
        recorder: Recorder,
        marks: tuple[Weight | None, Weight | None],
        layout: Layout,
        transposed: bool,
    ) -> Tensor:
        """`[…, p]` from x `[…, d]`; weight `[p, d]`, or `[d, p]` if transposed."""
        ctx.recorder, ctx.marks, ctx.layout, ctx.transposed, ctx.like = (
            recorder,
            marks,
            layout,
            transposed,
            probe,
        )
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return _alias(F.linear(x, weight.t() if transposed else weight, bias))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W and b as autograd has them, and the scores."""
        x, weight = ctx.saved_tensors  # under the capture, as in `Observe`
        recorder = ctx.recorder
        with torch._C.DisableTorchFunction(), torch.autocast(gy.device.type, enabled=False):
            gx = None
            if ctx.needs_input_grad[0]:
                gx = F.linear(gy, weight if ctx.transposed else weight.t())
            try:
                with torch.no_grad():
                    gw, gb, scores = _linear_backward(ctx, x, gy)
            except Exception as error:
                recorder.fault("in the backward pass", error)
                gw, gb, scores = _plain_gradients(ctx, x, gy)
            if torch.is_grad_enabled() and recorder.looking is None:  # create_graph=True
                gw, gb, _ = _plain_gradients(ctx, x, gy)
        gx, gw, gb = (once(g, recorder) for g in (gx, gw, gb))
        return gx, gw, gb, scores, None, None, None, None


class Once(torch.autograd.Function):
    """Passes a gradient on, and says so where it is differentiated once more on the way to `.grad`."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, recorder: Recorder) -> Tensor:
        """The gradient itself."""
        ctx.recorder = recorder
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The same."""
        if not ctx.recorder.idle:
            error = CoverageError(
                "inside run.step the loss contains a gradient of the loss (create_graph=True: a gradient penalty, a "
                "meta-gradient), and that part of it cannot be divided among the samples; leave it out of run.step: "
                "what another backward pass adds to .grad before the block is not valued."
            )
            ctx.recorder.fault("in the backward pass", error)
        return gradient, None


def once(gradient: Tensor | None, recorder: Recorder) -> Tensor | None:
    """A gradient as it leaves a node; under `create_graph=True` it must not be differentiated again unnoticed."""
    if gradient is None or not gradient.requires_grad:
        return gradient
    with torch._C.DisableTorchFunction():
        return Once.apply(gradient, recorder)  # type: ignore[no-any-return, no-untyped-call]


def _alias(y: Tensor) -> Tensor:
    """The same memory as a tensor of its own: what a custom function returns as a view cannot be changed in place."""
    if not y._is_view():
        return y.detach()
    return torch.ops.aten._unsafe_view(y.detach(), y.shape)  # type: ignore[no-any-return]


def _linear_backward(ctx: Any, x: Tensor, gy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    recorder: Recorder = ctx.recorder
    if recorder.idle:
        return _plain_gradients(ctx, x, gy)
    on_weight, on_bias = ctx.marks
    scores = torch.zeros_like(ctx.like)
    gw = gb = None
    if recorder.looking is not None:  # only the factored gradients are wanted
        uses: list[tuple[Weight, Factors]] = []
        if on_weight is not None:
            uses.append((on_weight, Outer(x, gy, ctx.layout, ctx.transposed)))
        if on_bias is not None:
            uses.append((on_bias, Dense(ctx.layout.per_sample_sum(gy, keep=1))))
        return None, None, recorder.record(uses, ctx.like)
    if ctx.needs_input_grad[1]:
        gw = _weight_backward(recorder, on_weight, x, gy, ctx, scores)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        per_sample = ctx.layout.per_sample_sum(gy, keep=1)  # [B, p]
        gb = per_sample.sum(0)
        if on_bias is not None:
            scores += recorder.record([(on_bias, Dense(per_sample))], ctx.like)
    return gw, gb, scores


def _plain_gradients(ctx: Any, x: Tensor, gy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of W and b alone."""
    a, b = (gy, x) if ctx.transposed else (x, gy)
    flat = gy.reshape(-1, gy.shape[-1])
    gw = b.reshape(-1, b.shape[-1]).t() @ a.reshape(-1, a.shape[-1]) if ctx.needs_input_grad[1] else None
    gb = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return gw, gb, torch.zeros_like(ctx.like)


def _weight_backward(
    recorder: Recorder, weight: Weight | None, x: Tensor, gy: Tensor, ctx: Any, scores: Tensor
) -> Tensor:
    """The weight's gradient; its per-sample gradients are kept or added to `scores` on the way."""
    a, b = (gy, x) if ctx.transposed else (x, gy)  # gW = bᵀ a in the weight's own orientation
    groups: dict[int, Tensor] = {}
    if weight is not None and recorder.counts(weight):
        outer = Outer(x, gy, ctx.layout, ctx.transposed)
        if recorder.keeps(weight):
            blocks = per_sample_gradients(a, b, ctx.layout, recorder.room, recorder.rounded)
            if blocks is not None:
                return _block_by_block(recorder, weight, blocks, scores)
            recorder.keep(weight, outer)
        recorder.hand_on(weight, outer)
        short = recorder.products_by_pairs(weight, outer)
        for group, products in (short or {}).items():
            scores[group] += products
        groups = recorder.directions_of(weight) if short is None else {}
    if len(groups) == 1:
        ((group, directions),) = groups.items()
        gw, products = weight_gradient_and_products(a, b, ctx.layout, directions, recorder.room)
        scores[group] += products
        return gw
    for group, directions in groups.items():
        scores[group] += outer.dot(directions)
    return b.reshape(-1, b.shape[-1]).t() @ a.reshape(-1, a.shape[-1])


def _block_by_block(recorder: Recorder, weight: Weight, blocks: Blocks, scores: Tensor) -> Tensor:
    """The weight's gradient; its per-sample gradients are kept, shown and added to `scores` while they are formed."""
    directions = recorder.directions_of(weight)
    total: Tensor | None = None
    for part, gradients in blocks:
        summed = gradients.sum(0)
        total = summed if total is None else total.add_(summed)
        recorder.hand_on(weight, Dense(gradients), part)
        for group, G in directions.items():
            scores[group, :, part] += Dense(gradients).dot(G)
    whole = Dense(blocks.whole)
    recorder.keep(
        weight, Rounded(whole) if recorder.rounded and whole.gradients.dtype == torch.bfloat16 else whole
    )
    assert total is not None
    return total
