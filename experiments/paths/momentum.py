"""The carried line shared out from sketches of growing size, beside the exact per-sample gradients."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch.nn.utils import clip_grad_norm_

import assay
from experiments.command import run_as_command
from experiments.paths.common import adamw, gpt, loss_fn, mixture, spearman, targets

DOMAINS = ("novels", "python_code", "formal_math")
STEPS, SAMPLES, SEED, LR, CLIP = 80, 8, 0, 1e-3, 1.0
SIZES = (251, 1021, 4093)


def one(momentum: str, **options: Any) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Values by sample, the account, and the bytes held for the horizon."""
    model = gpt(SEED)
    optimizer = adamw(model, LR)
    data = mixture(DOMAINS, SAMPLES * STEPS, SEED).view(STEPS, SAMPLES, -1)
    method = assay.InRunShapley(targets(DOMAINS[:1]), "trapezoid", momentum, **options)
    with assay.Run(model, optimizer, methods=[method], check="off") as run:
        for step, batch in enumerate(data):
            with run.step(range(SAMPLES * step, SAMPLES * (step + 1))):
                loss_fn(model, batch).backward()
            clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    tables = run.ledger.tables
    held = run.ledger.table("momentum")["bytes"][0] if "momentum" in tables else 0
    return run.ledger.values().sort("id"), run.ledger.account(), held


def experiment() -> dict[str, Any]:
    """Rank correlation with the exact values, the share of the carried line given to samples, and memory."""
    instant, line, _ = one("instant")
    exact, account, exact_bytes = one("exact")
    truth = torch.tensor(exact["value"].to_list())

    def row(name: str, values: pl.DataFrame, rest: pl.DataFrame, held: int) -> dict[str, Any]:
        found = torch.tensor(values["value"].to_list())
        # of what is carried in every step, how much was given to samples: |rest| against |whole|
        left = float(rest["carried"].abs().sum() / line["carried"].abs().sum())
        return {
            "momentum": name,
            "spearman": spearman(found, truth),
            "relative_rmse": float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt()),
            "shared_out": 1 - left,
            "bytes": held,
        }

    table = [row("instant", instant, line, 0), row("exact", exact, account, exact_bytes)]
    table += [row(f"sketch {size}", *one("sketch", sketch=size)) for size in SIZES]
    model = gpt(SEED)
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32, float32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": f"AdamW 0.9/0.95, lr {LR}, decay 0.1, clipping {CLIP}, {STEPS} steps of {SAMPLES}",
        "seed": SEED,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("momentum", "paths.momentum", experiment)
