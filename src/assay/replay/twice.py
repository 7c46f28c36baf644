"""The capture in a gradient that is differentiated again.

Its nodes pass the output's gradient on unchanged, so that a second derivative goes through them as if they were not
there; the per-sample inner products are read in the first pass, and have no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from assay.capture import Capture
from assay.capture.call import Call, operands
from assay.capture.layout import Layout
from assay.capture.marks import Weight
from assay.capture.probe import Explain, Observe, ObserveInPlace, Use

__all__ = ["TwiceCapture"]


class TwiceCapture(Capture):
    """`assay.capture.Capture` with `strict=True`, whose backward pass can be differentiated.

    Attributes:
        measuring: whether the nodes read inner products; to be switched off before the second pass.
        linked: whether the inner products themselves can be differentiated. Their sum over the samples is ⟨∇L, λ⟩,
            whose gradient is H λ: the weight gradients need not be formed at all. Rules that differentiate forward
            (convolutions, operations without a rule of their own) lose that link, so its result is to be compared.
    """

    measuring = True
    linked = False

    def observe(
        self, call: Call, y: Tensor, explain: Explain, saved: Sequence[Tensor], layout: Layout | None = None
    ) -> Tensor:
        """`y` under a node that reads its gradient and passes it on."""
        layout = layout or self.layout_of(call, y)
        watch = _PassInPlace if call.in_place else _Pass
        tensors, _ = operands(call.args, call.kwargs)
        weights = tuple(mark for t in tensors if isinstance(mark := self.mark_of(t), Weight))
        if y.requires_grad:
            y = watch.apply(y, self.probe, Use(self, explain), *saved)  # type: ignore[no-untyped-call]
        return self.note(call, weights, y, layout, call.name)


class _Pass(Observe):
    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, use: Use, *saved: Tensor) -> Tensor:
        ctx.count = len(saved)
        return Observe.forward(ctx, y, probe, use, *saved)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """`gy` itself, with its history; the scores without one."""
        if not ctx.use.recorder.measuring:
            return (gy, None, None, *(None for _ in range(ctx.count)))
        saved = ctx.saved_tensors
        if ctx.use.recorder.linked:
            with torch._C.DisableTorchFunction():
                scores = ctx.use.recorder.record(ctx.use.explain(gy, saved), ctx.like)
            return (gy, scores, None, *(None for _ in saved))
        with torch.no_grad(), torch._C.DisableTorchFunction():
            fixed = [x.detach() for x in saved]
            scores = ctx.use.recorder.record(ctx.use.explain(gy.detach(), fixed), ctx.like)
        return (gy, scores, None, *(None for _ in saved))


class _PassInPlace(ObserveInPlace):
    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, use: Use, *saved: Tensor) -> Tensor:
        ctx.count = len(saved)
        return ObserveInPlace.forward(ctx, y, probe, use, *saved)

    backward = _Pass.backward
