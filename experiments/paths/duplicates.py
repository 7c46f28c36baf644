"""One document planted k times in a batch: which paths give each copy less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.evaluate import StepUtility, shapley_values
from experiments.command import run_as_command
from experiments.paths.common import (
    adamw,
    gpt,
    loss_fn,
    mixture,
    moves_of_step,
    targets,
    values_of_step,
)

PATHS = ("left", "hessian", "trapezoid", "simpson")
COPIES = (1, 2, 4, 8)
DOMAINS = ("novels", "python_code", "formal_math")
SAMPLES, WARM, SEED, WARM_LR, LR = 8, 60, 0, 1e-3, 0.02


def experiment() -> dict[str, Any]:
    """The worth of one copy, by path and over all subsets of the batch, in one SGD step of a warmed-up GPT."""
    data = mixture(DOMAINS, SAMPLES * (WARM + 1), SEED).view(WARM + 1, SAMPLES, -1)
    target = targets(DOMAINS[:1])
    model = gpt(SEED, torch.float64)
    optimizer: torch.optim.Optimizer = adamw(model, WARM_LR)
    for step in range(WARM):
        optimizer.zero_grad()
        loss_fn(model, data[step]).backward()
        optimizer.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.zero_grad()
    table = []
    for copies in COPIES:
        batch = data[WARM].clone()
        batch[:copies] = data[WARM][0]

        def part(i: int, batch: Tensor = batch) -> Tensor:
            return loss_fn(model, batch[[i]]) / SAMPLES

        moves = moves_of_step(model, optimizer, part, SAMPLES)
        moves = {p: m[:SAMPLES] for p, m in moves.items()}
        truth = shapley_values(StepUtility(model, target, moves), SAMPLES)[0, 0]
        table.append({"copies": copies, "path": "all subsets", "value": float(truth)})
        for path in PATHS:
            found, _ = values_of_step(
                model, optimizer, lambda m, batch=batch: loss_fn(m, batch), SAMPLES, target, path
            )
            table.append({"copies": copies, "path": path, "value": float(found[0])})
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32, float64",
        "samples": SAMPLES,
        "lr": LR,
        "warm_steps": WARM,
        "seed": SEED,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("duplicates", "paths.duplicates", experiment)
