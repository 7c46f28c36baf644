"""The capture in a gradient that is differentiated again.

Its nodes pass the output's gradient on unchanged, so that a second derivative goes through them as if they were not
there; the per-sample inner products are read in the first pass, and have no derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.capture import Capture
from assay.capture.call import Call, tensors_of
from assay.capture.factors import Factors
from assay.capture.layout import Layout
from assay.capture.marks import Data, Weight
from assay.capture.probe import Explain, Observe, ObserveInPlace, Use
from assay.replay.pointwise import KNOWN, pointwise

__all__ = ["TwiceCapture"]


class TwiceCapture(Capture):
    """`assay.capture.Capture` with `strict=True`, whose backward pass can be differentiated.

    Attributes:
        measuring: whether the nodes read inner products; to be switched off before the second pass.
        linked: whether the uses are put aside with their history, in `put_aside`, for `assay.replay.links`, instead
            of being contracted at once. Rules that differentiate forward (convolutions, operations without a rule of
            their own) lose that history, so what is made of it is to be compared.
    """

    measuring = True
    linked = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.put_aside: list[tuple[Weight, Factors]] = []

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `func`; an activation of the samples so that several queries share its second derivative."""
        if func in KNOWN and len(args) == 1 and torch.is_grad_enabled() and self.linked:
            mark = self.mark_of(args[0])
            if isinstance(mark, Data) and args[0].requires_grad:
                with torch._C.DisableTorchFunction():
                    y = pointwise(func, args[0], kwargs)
                if y is not None:
                    self._set(y, mark)
                    return y
        return super()._follow(func, args, kwargs)

    def observe(
        self, call: Call, y: Tensor, explain: Explain, saved: Sequence[Tensor], layout: Layout | None = None
    ) -> Tensor:
        """`y` under a node that reads its gradient and passes it on."""
        layout = layout or self.layout_of(call, y)
        watch = _PassInPlace if call.in_place else _Pass
        tensors = tensors_of(call.args, call.kwargs)
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
                ctx.use.recorder.put_aside += ctx.use.explain(gy, saved)
                return (gy, torch.zeros_like(ctx.like), None, *(None for _ in saved))
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
