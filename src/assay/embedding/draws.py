"""A factor of the Gauss-Newton matrix of a softmax cross-entropy, read in the training step's own backward pass.

For L = Σ_n w_n · cross-entropy(z_n, y_n) over predictions n (tokens, images), p = softmax(z),

    H_GN = Σ_n w_n J_nᵀ (diag(p_n) − p_n p_nᵀ) J_n,        diag(p) − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ

so that sample i's rows √(w p_c) J_iᵀ (e_c − p), one per class, are an exact factor; and for random signs ε the one row
√w J_iᵀ Σ_c √p_c ε_c (e_c − p) is a factor in expectation, whatever the number of classes and predictions. Both are
gradients of the outputs under another output gradient: one more backward pass each, without weight gradients.

The weights w_n are not asked for: ∂L/∂z_n = w_n (p_n − e_y) tells them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from assay.errors import InputError

__all__ = ["logits_of", "output_gradients"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of ‖∂L/∂z‖; half precision: 0.1


def logits_of(output: Any) -> Tensor:
    """The logits among what a module returned.

    Raises:
        InputError: there are none.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, (Tensor, tuple)):
        output = getattr(output, "logits", None)
    if isinstance(output, Tensor) and output.dim() >= 2 and output.is_floating_point():
        return output
    raise InputError(
        "DataValueEmbedding(curvature='ggn'): the module's output holds no logits [samples, …, classes]; name the "
        "module whose output they are, as logits='head'."
    )


def output_gradients(
    logits: Tensor, gradient: Tensor, draws: int | Literal["all"], generator: torch.Generator
) -> Iterator[Tensor]:
    """Output gradients `[..., C]`, one per draw, whose pull-backs are the rows of the factor.

    Args:
        logits: `[B, ..., C]`.
        gradient: ∂L/∂logits.
        draws: how many random rows, or one per class.
        generator: of the signs, on the host.

    Raises:
        InputError: the gradient is not that of a softmax cross-entropy, or "all" with several predictions per sample.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = logits.detach().to(wide).softmax(-1)
    weights = _weights(p, gradient.to(wide))
    root = weights.sqrt()[..., None]
    if draws == "all":
        if logits.dim() != 2:
            raise InputError(
                f"draws='all' needs one prediction per sample, and the logits have shape {list(logits.shape)}; give a "
                "number of draws."
            )
        for c in range(p.shape[-1]):
            e = torch.zeros_like(p)
            e[..., c] = 1.0
            yield (root * p[..., c : c + 1].sqrt() * (e - p)).to(logits.dtype)
        return
    for _ in range(draws):
        signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p.device, wide) * 2 - 1
        drawn = p.sqrt() * signs
        yield (root * (drawn - p * drawn.sum(-1, keepdim=True)) / draws**0.5).to(logits.dtype)


def _weights(p: Tensor, gradient: Tensor) -> Tensor:
    """`[...]`: w of each prediction from w (p − e_y); the label y has the one negative entry."""
    y = gradient.argmin(-1, keepdim=True)
    others = torch.ones_like(p).scatter_(-1, y, 0.0)
    rest = (p * others).sum(-1)
    weights = torch.where(rest > 0, (gradient * others).sum(-1) / rest, 0.0).clamp_min(0.0)
    expected = weights[..., None] * (p - (1 - others))
    size, off = gradient.norm(), (gradient - expected).norm()
    if bool(torch.isfinite(size)) and bool(off > TOLERANCE.get(gradient.dtype, 0.1) * size):
        raise InputError(
            "DataValueEmbedding(curvature='ggn'): the loss is no softmax cross-entropy of these logits (label "
            "smoothing, class weights, another loss, or logits that are used twice?); use curvature='fisher'."
        )
    return weights
