"""The same recursion with nothing projected, and from the side of the queries: what a projection could reach at best.

A row ψ per query is carried back instead of an operator, so that all parameters fit. Written without the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

__all__ = ["Trajectory", "influence"]

Batch = tuple[Tensor, Tensor]


@dataclass
class Trajectory:
    """A run of SGD or AdamW, as it must be known to go back.

    Args:
        model: its structure.
        weights: `[entries]` before every step.
        batches: images and digits of every step.
        speed: s of every step.
        D: `[entries]` of every step.
        keep: ρ.
        decay: β.
        end: `[entries]`, the weights at the end.
    """

    model: nn.Module
    weights: list[Tensor]
    batches: list[Batch]
    speed: list[float]
    D: list[Tensor]
    keep: float
    decay: float
    end: Tensor


def train(
    model: nn.Module, batches: Sequence[Batch], adam: bool, lr: float, weight_decay: float = 0.0
) -> Trajectory:
    """Cross-entropy, mean over the batch; AdamW with torch's own constants."""
    loss = _loss_of(model)
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    path = Trajectory(model, [], list(batches), [], [], 1 - lr * weight_decay, 0.9 if adam else 0.0, w)
    for t, (x, y) in enumerate(batches, 1):
        g = grad(lambda w, x=x, y=y: loss(w, x, y).mean())(w)
        path.weights.append(w)
        if adam:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            D, s = 1 / ((v / (1 - 0.999**t)).sqrt() + 1e-8), lr * 0.1 / (1 - 0.9**t)
            w = path.keep * w - s * D * m / 0.1
        else:
            D, s = torch.ones_like(g), lr
            w = w - lr * g
        path.speed.append(s)
        path.D.append(D)
    path.end = w
    return path


@dataclass
class _Form:
    """One form of the recursion on its way back."""

    curvature: str
    parts: list[slice]
    beta: float
    root: bool
    psi: Tensor
    buffer: Tensor
    found: list[Tensor]


Form = tuple[str, str, bool, str]
"""Curvature "fisher" or "ggn", blocks "layer" or "all", whether momentum is in the state, and where D goes: "both"
keeps x and D x, as the library does; "root" works in coordinates √D w, as if D did not change from step to step."""


def influence(path: Trajectory, queries: Sequence[Batch], forms: Sequence[Form]) -> dict[Form, Tensor]:
    """`[Q, rows]` each: ∇ℓ(w_T)ᵀ E of every sample of every step."""
    loss, logits = _loss_of(path.model), _logits_of(path.model)
    psi = torch.stack([grad(lambda w, q=q: loss(w, *q).mean())(path.end) for q in queries])  # [Q, entries]
    layers = _blocks(path.model)
    running = {}
    for form in forms:
        curvature, blocks, momentum, coordinates = form
        start = psi * path.D[-1].sqrt() if coordinates == "root" else psi.clone()
        parts = layers if blocks == "layer" else [slice(0, psi.shape[1])]
        beta = path.decay if momentum else 0.0
        root = coordinates == "root"
        running[form] = _Form(curvature, parts, beta, root, start, torch.zeros_like(psi), [])
    for t in reversed(range(len(path.batches))):
        (x, y), w, D, s = path.batches[t], path.weights[t], path.D[t], path.speed[t]
        own = lambda w, x, y: loss(w, x[None], y[None]).mean()  # noqa: E731
        g = vmap(grad(own), in_dims=(None, 0, 0))(w, x, y) / len(y)  # [B, entries]
        p = logits(w, x).softmax(1)
        dz = vmap(jacrev(lambda w, x: logits(w, x[None])[0]), in_dims=(None, 0))(w, x)  # [B, C, entries]
        root = p.sqrt()[:, :, None] * (torch.eye(p.shape[1]).to(p) - p[:, None, :])  # [B, C, C]
        factors = {"fisher": g * len(y) ** 0.5, "ggn": (root @ dz).flatten(0, 1) / len(y) ** 0.5}
        for form in running.values():
            J = factors[form.curvature]
            left = D.sqrt() if form.root else D
            right = form.psi.new_ones(()) if not form.root else left
            chi = (s * form.psi - form.buffer) * left
            form.found.append(chi @ g.t())
            form.buffer = form.beta * (form.buffer - s * form.psi)
            form.psi = path.keep * form.psi
            for part in form.parts:
                form.psi[:, part] -= ((chi[:, part] @ J[:, part].t()) @ J[:, part]) * right.expand_as(D)[part]
    return {form: torch.cat(own.found[::-1], 1) for form, own in running.items()}


def _blocks(model: nn.Module) -> list[slice]:
    """The parameters of each module together."""
    found: dict[str, list[int]] = {}
    start = 0
    for name, p in model.named_parameters():
        own = found.setdefault(name.rpartition(".")[0], [start, start])
        own[1] = start = start + p.numel()
    return [slice(a, b) for a, b in found.values()]


def _logits_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    named = list(model.named_parameters())

    def logits(w: Tensor, x: Tensor) -> Tensor:
        parts = w.split([p.numel() for _, p in named])  # type: ignore[no-untyped-call]
        values = {name: part.view_as(p) for (name, p), part in zip(named, parts, strict=True)}
        found: Tensor = functional_call(model, values, (x,))
        return found

    return logits


def _loss_of(model: nn.Module) -> Callable[..., Tensor]:
    logits = _logits_of(model)

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Any:
        return F.cross_entropy(logits(w, x), y, reduction="none")

    return loss
