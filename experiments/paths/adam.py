"""Values under AdamW and clipping against what leaving a sample out of its step really does, beside the dot product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import assay
from assay.evaluate import sample_gradients
from assay.optimizers import model_of
from assay.targets import TargetPass
from experiments.command import run_as_command
from experiments.paths.common import (
    adamw,
    copied,
    gpt,
    loss_fn,
    mixture,
    pearson,
    spearman,
    targets,
    values_of_step,
)

DOMAINS = ("novels", "python_code", "formal_math")
SAMPLES, STEPS, EVERY, SEED, LR = 16, 120, 10, 0, 1e-3
PATHS = ("left", "trapezoid", "simpson")
Rows = dict[str, list[Tensor]]


def clip_factor(gradient: dict[nn.Parameter, Tensor], clip: float | None) -> float:
    """What `clip_grad_norm_` would multiply a gradient by."""
    if clip is None:
        return 1.0
    norm = float(torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt())
    return min(1.0, clip / (norm + 1e-6))


def effects(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: dict[nn.Parameter, Tensor],
    target: dict[str, assay.Target],
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    """`[samples]` each: by how much the loss after the step is higher without the sample.

    First with K and the clipping of the whole step, from the same momentum; then with the optimizer run anew on the
    remaining gradient, clipped anew and with a second moment of its own.
    """
    params = list(gradients)
    passes = TargetPass(model, target, params)
    start = {p: p.detach().clone() for p in params}
    whole = {p: g.sum(0) for p, g in gradients.items()}
    c = clip_factor(whole, clip)
    linear = model_of(optimizer)
    splits = {p: linear.split(p, c * g) for p, g in whole.items()}

    def loss_after(step: dict[nn.Parameter, Tensor]) -> float:
        for p, w in start.items():
            p.data.copy_(w - step[p])
        loss = float(passes.losses())
        for p, w in start.items():
            p.data.copy_(w)
        return loss

    def fixed(gradient: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        lr = {p: linear.lr(linear.group_index(p)) for p in params}
        return {p: lr[p] * s.gain * c * gradient[p] + s.carried + s.decayed for p, s in splits.items()}

    def anew(gradient: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        c = clip_factor(gradient, clip)
        other, stepper = copied(model, optimizer)
        moved = dict(zip(params, other.parameters(), strict=True))
        for p, q in moved.items():
            q.grad = c * gradient[p]
        stepper.step()
        return {p: start[p] - q.detach() for p, q in moved.items()}

    result = []
    for rule in (fixed, anew):
        base = loss_after(rule(whole))
        left_out = [{p: whole[p] - g[i] for p, g in gradients.items()} for i in range(SAMPLES)]
        result.append(torch.tensor([loss_after(rule(rest)) - base for rest in left_out], dtype=torch.float64))
    return result[0], result[1]


def train(clip: float | None) -> tuple[Rows, Rows, list[float]]:
    """The true effects and the values found, `[samples]` for every tenth step, and what clipping did there."""
    data = mixture(DOMAINS, SAMPLES * STEPS, SEED).view(STEPS, SAMPLES, -1)
    target = targets(DOMAINS[:1])
    model = gpt(SEED, torch.float64)
    optimizer = adamw(model, LR)
    truth: Rows = {"fixed": [], "anew": []}
    found: Rows = {name: [] for name in (*PATHS, "dot")}
    factors = []
    for step, batch in enumerate(data):

        def part(i: int, batch: Tensor = batch) -> Tensor:
            return loss_fn(model, batch[[i]]) / SAMPLES

        if step % EVERY == EVERY - 1:
            gradients = sample_gradients(part, SAMPLES, list(model.parameters()))
            factors.append(clip_factor({p: g.sum(0) for p, g in gradients.items()}, clip))
            for name, effect in zip(truth, effects(model, optimizer, gradients, target, clip), strict=True):
                truth[name].append(effect)
            for path in PATHS:
                values, _ = values_of_step(
                    model, optimizer, lambda m, batch=batch: loss_fn(m, batch), SAMPLES, target, path, clip
                )
                found[path].append(values)
            _, slope = TargetPass(model, target, list(gradients)).gradients()
            dot = torch.stack([g.flatten(1) @ slope[p][0].flatten() for p, g in gradients.items()]).sum(0)
            found["dot"].append(dot)
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        clip_grad_norm_(model.parameters(), clip or float("inf"))
        optimizer.step()
    return truth, found, factors


def experiment() -> dict[str, Any]:
    """Correlations over all valued steps together, and on average inside a step."""
    table = []
    clipped: list[float] = []
    for clip in (None, 0.5):
        truth, found, factors = train(clip)
        if clip is not None:
            clipped = factors
        for score, values in found.items():
            for rule, effect in truth.items():
                inside = [pearson(v, e) for v, e in zip(values, effect, strict=True)]
                pooled = torch.cat(values), torch.cat(effect)
                table.append(
                    {
                        "clip": clip,
                        "score": score,
                        "truth": rule,
                        "pearson": pearson(*pooled),
                        "spearman": spearman(*pooled),
                        "pearson_inside": sum(inside) / len(inside),
                    }
                )
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32, float64",
        "samples": SAMPLES,
        "lr": LR,
        "steps": STEPS,
        "valued_every": EVERY,
        "seed": SEED,
        "clip_factors": clipped,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("adam", "paths.adam", experiment)
