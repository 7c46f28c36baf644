"""All paths against Shapley values over all subsets of one step's batch, at four learning rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import assay
from assay.evaluate import StepUtility, shapley_values
from experiments.command import run_as_command
from experiments.paths.common import moves_of_step, values_of_step

PATHS = ("left", "hessian", "trapezoid", "simpson")
RATES = {"SGD": (0.05, 0.1, 0.2, 0.4), "AdamW": (0.002, 0.004, 0.008, 0.016)}
SAMPLES, SEEDS, WARM = 8, 4, 5


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over the batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(kind: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Plain SGD, or AdamW with momentum and decay."""
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), lr=lr)
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def one(kind: str, lr: float, seed: int) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """True values, the paths' values and the share of the true change that each path's account explains."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    ).double()

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 10, generator=generator, dtype=torch.float64)
        return x, (x[:, :4] + 0.5 * x[:, 4:8].square()).argmax(1)

    optimizer = optimizer_of(kind, model, lr)
    for _ in range(WARM):
        optimizer.zero_grad()
        cross_entropy(model, draw(SAMPLES)).backward()
        optimizer.step()
    optimizer.zero_grad()
    x, y = draw(SAMPLES)
    target = {"held out": assay.Target([draw(32)], cross_entropy)}

    def part(i: int) -> Tensor:
        return cross_entropy(model, (x[[i]], y[[i]])) / SAMPLES

    moves = moves_of_step(model, optimizer, part, SAMPLES)
    players = SAMPLES + 2
    if kind == "SGD":  # nothing is carried or decayed
        moves, players = {p: m[:SAMPLES] for p, m in moves.items()}, SAMPLES
    truth = shapley_values(StepUtility(model, target, moves), players)[:SAMPLES, 0]
    found, explained = {}, {}
    for path in PATHS:
        found[path], account = values_of_step(
            model, optimizer, lambda m: cross_entropy(m, (x, y)), SAMPLES, target, path
        )
        lines = account["predicted"] + account["carried"] + account["decayed"]
        explained[path] = lines / account["actual"]
    return truth, found, explained


def experiment() -> dict[str, Any]:
    """Largest errors over the largest value, their orders in the learning rate, and how the accounts close."""
    table = []
    orders: dict[str, dict[str, float]] = {}
    for kind, rates in RATES.items():
        errors: dict[str, list[float]] = {path: [] for path in PATHS}
        for lr in rates:
            runs = [one(kind, lr, seed) for seed in range(SEEDS)]
            for path in PATHS:
                worst = [float((found[path] - truth).abs().max()) for truth, found, _ in runs]
                size = [float(truth.abs().max()) for truth, _, _ in runs]
                errors[path].append(float(np.mean(worst)))
                table.append(
                    {
                        "optimizer": kind,
                        "lr": lr,
                        "path": path,
                        "error": float(np.mean(worst)),
                        "relative": float(np.mean([w / s for w, s in zip(worst, size, strict=True)])),
                        "unexplained": float(np.mean([abs(1 - explained[path]) for _, _, explained in runs])),
                    }
                )
        orders[kind] = {path: float(np.polyfit(np.log(rates), np.log(errors[path]), 1)[0]) for path in PATHS}
    return {
        "model": "MLP 10-16-16-4, tanh, float64",
        "samples": SAMPLES,
        "seeds": list(range(SEEDS)),
        "warm_steps": WARM,
        "table": table,
        "orders": orders,
    }


if __name__ == "__main__":
    run_as_command("brute_force", "paths.brute_force", experiment)
