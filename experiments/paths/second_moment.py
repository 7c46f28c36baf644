"""What K_t with v_{t−1} in place of v_t would get wrong (the published form for Adam)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.evaluate import sample_gradients
from assay.optimizers import model_of
from assay.targets import TargetPass
from experiments.command import run_as_command
from experiments.paths.common import adamw, gpt, loss_fn, mixture, rmse, targets

DOMAINS = ("novels", "python_code", "formal_math")
SAMPLES, STEPS, SEED, LR = 8, 60, 0, 1e-3
VALUED = (1, 2, 5, 10, 20, 40, 59)


def one(tied: bool) -> list[dict[str, Any]]:
    """Rows for a model whose embedding is its output matrix as well, or is not."""
    data = mixture(DOMAINS, SAMPLES * STEPS, SEED).view(STEPS, SAMPLES, -1)
    model = gpt(SEED, torch.float64)
    if not tied:
        model.head = torch.nn.Linear(32, 128, bias=False).double()
    params = list(model.parameters())
    optimizer = adamw(model, LR)
    linear = model_of(optimizer)
    passes = TargetPass(model, targets(DOMAINS[:1]), params)
    table = []
    for step, batch in enumerate(data):

        def part(i: int, batch: Tensor = batch) -> Tensor:
            return loss_fn(model, batch[[i]]) / SAMPLES

        if step in VALUED:
            gradients = sample_gradients(part, SAMPLES, params)
            _, slope = passes.gradients()
            values = {"now": torch.zeros(SAMPLES).double(), "before": torch.zeros(SAMPLES).double()}
            ratio = 0.0
            for p, g in gradients.items():
                now = torch.as_tensor(linear.split(p, g.sum(0)).gain)
                before = torch.as_tensor(linear.previous_gain(p))
                moved = g.sum(0) != 0
                ratio = max(ratio, float((before / now)[moved].max()))
                for name, gain in (("now", now), ("before", before)):
                    values[name] += LR * g.flatten(1) @ (slope[p][0] * gain).flatten()
            size = float(values["now"].square().mean().sqrt())
            error = rmse(values["before"], values["now"]) / size
            table.append({"tied": tied, "step": step, "largest_ratio": ratio, "relative_rmse": error})
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return table


def experiment() -> dict[str, Any]:
    """By step: the largest ratio of the two gains, and the error of the values that it makes."""
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32, float64",
        "samples": SAMPLES,
        "lr": LR,
        "seed": SEED,
        "table": one(tied=True) + one(tied=False),
    }


if __name__ == "__main__":
    run_as_command("second_moment", "paths.second_moment", experiment)
