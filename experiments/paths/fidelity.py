"""All paths against Monte-Carlo Shapley values in one training step of a tiny GPT (the paper's fidelity experiment)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from assay.evaluate import StepUtility, monte_carlo_shapley
from experiments.command import run_as_command
from experiments.paths.common import (
    adamw,
    gpt,
    loss_fn,
    mixture,
    moves_of_step,
    rmse,
    spearman,
    targets,
    values_of_step,
)

PATHS = ("left", "hessian", "trapezoid", "simpson")
RATES = (3e-4, 1e-3, 5e-3)
DOMAINS = ("novels", "python_code", "formal_math")
SAMPLES, WARM, PERMUTATIONS, SEED = 16, 100, 1000, 0


def compare(lr: float, seed: int, permutations: int) -> list[dict[str, Any]]:
    """A row per path, in one step after so many of a tiny GPT."""
    data = mixture(DOMAINS, SAMPLES * (WARM + 1), seed).view(WARM + 1, SAMPLES, -1)
    target = targets(DOMAINS[:1])
    model = gpt(seed, torch.float64)
    optimizer = adamw(model, lr)
    for step in range(WARM):
        optimizer.zero_grad()
        loss_fn(model, data[step]).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    batch = data[WARM]

    def part(i: int) -> Tensor:
        return loss_fn(model, batch[[i]]) / SAMPLES

    moves = moves_of_step(model, optimizer, part, SAMPLES)
    utility = StepUtility(model, target, moves)
    truth, error = monte_carlo_shapley(utility, SAMPLES + 2, permutations, seed)
    truth, error = truth[:SAMPLES, 0], error[:SAMPLES, 0]
    rows = []
    for path in PATHS:
        found, _ = values_of_step(model, optimizer, lambda m: loss_fn(m, batch), SAMPLES, target, path)
        rows.append(
            {
                "lr": lr,
                "path": path,
                "rmse": rmse(found, truth),
                "spearman": spearman(found, truth),
                "standard_error": float(error.square().mean().sqrt()),
                "size": float(truth.square().mean().sqrt()),
            }
        )
    return rows


def experiment() -> dict[str, Any]:
    """RMSE and rank correlation of every path with 1000-permutation Shapley values."""
    table = [row for lr in RATES for row in compare(lr, SEED, PERMUTATIONS)]
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32, float64",
        "samples": SAMPLES,
        "warm_steps": WARM,
        "permutations": PERMUTATIONS,
        "seed": SEED,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("fidelity", "paths.fidelity", experiment)
