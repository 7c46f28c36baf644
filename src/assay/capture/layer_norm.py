"""Layer normalisation that forms its own weight gradients, sample by sample, in one pass over its input.

y = x̂·w + b with x̂ = (x − μ)·ρ: sample i's gradients are g_i(w) = Σ_t gy·x̂ and g_i(b) = Σ_t gy. Their sums over the
samples are the weight gradients, so that torch's own pass for those is not made. μ and ρ are those of the forward
pass. On a CPU torch's own kernel is run for one large sample after the other; of small ones a few are worked on at a
time, so that what is between stays in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.capture.factors import Dense, Factors
from assay.capture.marks import Weight
from assay.capture.probe import once
from assay.capture.recorder import Recorder

__all__ = ["ObservedLayerNorm"]

ALONE = 1 << 17  # bytes of a sample's rows from which on it is worth a call of its own
BLOCK = 1 << 20  # bytes of a product of small samples that are made at once


class ObservedLayerNorm(torch.autograd.Function):
    """`F.layer_norm(x, shape, weight, bias, eps)` of samples in rows `[B·inner, …]`, and the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        probe: Tensor,
        recorder: Recorder,
        marks: tuple[Weight, Weight | None],
        batch: int,
    ) -> Tensor:
        """The normalised x."""
        y, mean, rstd = torch.native_layer_norm(x, list(shape), weight, bias, eps)
        ctx.recorder, ctx.marks, ctx.like, ctx.shape, ctx.batch = recorder, marks, probe, shape, batch
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w and b as autograd has them, and the scores."""
        x, weight, bias, mean, rstd = ctx.saved_tensors  # under the capture, as in `probe.Observe`
        recorder = ctx.recorder
        with torch._C.DisableTorchFunction():
            whole = recorder.idle or torch.is_grad_enabled()  # create_graph=True
            wanted = [ctx.needs_input_grad[0], whole, whole and bias is not None]
            scores = torch.zeros_like(ctx.like)
            try:
                if not recorder.idle:
                    with torch.no_grad():
                        gw, gb = _per_sample(x, gy, mean, rstd, len(ctx.shape), ctx.batch)
                        on_weight, on_bias = ctx.marks
                        uses: list[tuple[Weight, Factors]] = [(on_weight, Dense(gw))]
                        if on_bias is not None:
                            uses.append((on_bias, Dense(gb)))
                        scores = recorder.record(uses, ctx.like)
            except Exception as error:
                recorder.fault("in the backward pass", error)
                wanted = [wanted[0], True, bias is not None]
            gx, whole_w, whole_b = torch.ops.aten.native_layer_norm_backward(
                gy, x, list(ctx.shape), mean, rstd, weight, bias, wanted
            )
            if not wanted[1]:
                whole_w, whole_b = gw.sum(0), gb.sum(0) if bias is not None else None
        gx, whole_w, whole_b = (once(g, recorder) for g in (gx, whole_w, whole_b))
        return gx, whole_w, whole_b, None, None, scores, None, None, None


def _per_sample(
    x: Tensor, gy: Tensor, mean: Tensor, rstd: Tensor, keep: int, batch: int
) -> tuple[Tensor, Tensor]:
    """`[B, *shape]` twice: the gradients of w and of b."""
    shape = x.shape[x.dim() - keep :]
    x, gy = x.reshape(batch, -1, shape.numel()), gy.reshape(batch, -1, shape.numel())  # [B, rows, n]
    mean, rstd = mean.reshape(batch, -1, 1), rstd.reshape(batch, 1, -1)
    rows, n = x.shape[1:]
    if type(x) is not Tensor or x.device.type != "cpu":  # traced by a compiler that fuses, or on a GPU
        gw, gb = torch.bmm(rstd, (x - mean) * gy).squeeze(1), gy.sum(1)
    elif rows * n * x.element_size() >= ALONE:
        gw, gb = _one_by_one(x, gy, mean, rstd)
    else:
        gw, gb = _in_blocks(x, gy, mean, rstd)
    return gw.view(batch, *shape), gb.view(batch, *shape)


def _one_by_one(x: Tensor, gy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, n]` twice, by torch's kernel without the gradient of x."""
    n = x.shape[2]
    some = x.new_empty(n)  # stands for w and b, whose numbers do not enter
    found = [
        torch.ops.aten.native_layer_norm_backward(g, a, [n], mu, rho, some, some, [False, True, True])[1:]
        for g, a, mu, rho in zip(gy.unbind(), x.unbind(), mean.unbind(), rstd.mT.unbind(), strict=True)
    ]
    gw, gb = zip(*found, strict=True)
    return torch.stack(gw), torch.stack(gb)


def _in_blocks(x: Tensor, gy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The same by products of a few samples."""
    batch, rows, n = x.shape
    gw, gb = x.new_empty(batch, n), x.new_empty(batch, n)
    block = min(batch, max(1, BLOCK // max(rows * n * x.element_size(), 1)))
    room = x.new_empty(block, rows, n)
    for start in range(0, batch, block):  # a few iterations
        part = slice(start, min(start + block, batch))
        product = torch.sub(x[part], mean[part], out=room[: part.stop - start]).mul_(gy[part])
        torch.bmm(rstd[part], product, out=gw[part].unsqueeze(1))
        torch.sum(gy[part], 1, out=gb[part])
    return gw, gb
