"""The trapezoid with a correction from rounded gradients beside the exact one: the error of every value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import assay
from experiments.command import run_as_command
from experiments.paths.common import adamw, gpt, loss_fn, mixture, spearman, targets

DOMAINS = ("novels", "python_code", "formal_math")
STEPS, SAMPLES, SEED, CLIP = 40, 8, 0, 1.0
OPTIMIZERS = {"AdamW": 1e-3, "SGD": 0.1}
WAYS = {
    "left": ("left", "keep"),
    "reduced": ("trapezoid", "reduced"),
    "recompute": ("trapezoid", "recompute"),
}


def one(optimizer: str, path: str, memory: str) -> tuple[Tensor, Tensor]:
    """Every value, and every step's total."""
    model, lr = gpt(SEED), OPTIMIZERS[optimizer]
    steps = (
        adamw(model, lr) if optimizer == "AdamW" else torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    )
    data = mixture(DOMAINS, SAMPLES * STEPS, SEED).view(STEPS, SAMPLES, -1)
    method = assay.InRunShapley(targets(DOMAINS[:1], count=2), path, memory=memory)
    with assay.Run(model, steps, methods=[method], check="off") as run:
        for step, batch in enumerate(data):
            with run.step(range(SAMPLES * step, SAMPLES * (step + 1))):
                loss_fn(model, batch).backward()
            clip_grad_norm_(model.parameters(), CLIP)
            steps.step()
            steps.zero_grad()
    values = torch.tensor(run.ledger.steps().sort("id")["value"].to_list(), dtype=torch.float64)
    return values, torch.tensor(run.ledger.account()["predicted"].to_list(), dtype=torch.float64)


def experiment() -> dict[str, Any]:
    """Errors of single values and of steps' totals, relative to the size of the values."""
    table = []
    for optimizer in OPTIMIZERS:
        truth, totals = one(optimizer, "trapezoid", "keep")
        size = float(truth.square().mean().sqrt())
        for name, (path, memory) in WAYS.items():
            values, sums = one(optimizer, path, memory)
            table.append(
                {
                    "optimizer": optimizer,
                    "way": name,
                    "rmse": float((values - truth).square().mean().sqrt()) / size,
                    "worst": float((values - truth).abs().max()) / size,
                    "worst_total": float((sums - totals).abs().max()) / size,
                    "spearman": spearman(values, truth),
                }
            )
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32, float32",
        "training": f"{STEPS} steps of {SAMPLES}, clipping {CLIP}; "
        + ", ".join(f"{name} with learning rate {lr}" for name, lr in OPTIMIZERS.items()),
        "seed": SEED,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("reduced", "paths.reduced", experiment)
