"""How much of the real loss drop of whole runs the account explains, over three decades of the learning rate."""

from __future__ import annotations

import warnings
from math import cos, pi
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

import assay
from experiments.command import run_as_command
from experiments.paths.common import adamw, gpt, loss_fn, mixture, targets

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
METHODS: dict[str, dict[str, Any]] = {
    "left": {"path": "left"},
    "trapezoid": {"path": "trapezoid"},
    "simpson": {"path": "simpson"},
    "simpson, tolerance 0.02": {"path": "simpson", "tolerance": 0.02},
}
DOMAINS = ("novels", "python_code", "formal_math")
STEPS, SAMPLES, WARMUP, SEED, CLIP = 100, 8, 10, 0, 1.0


def schedule(step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.9 * (1 + cos(pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def one(lr: float, options: dict[str, Any]) -> dict[str, Any]:
    """One run: the explained share and the lines of every target's account, and the points that it took."""
    model = gpt(SEED)
    optimizer = adamw(model, lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    data = mixture(DOMAINS, SAMPLES * STEPS, SEED).view(STEPS, SAMPLES, -1)
    method = assay.InRunShapley(targets(DOMAINS[:2], count=2), **options)
    with assay.Run(model, optimizer, methods=[method], check="off") as run:
        for step, batch in enumerate(data):
            with run.step(range(SAMPLES * step, SAMPLES * (step + 1))):
                loss_fn(model, batch).backward()
            clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    shares, lines = {}, {}
    for name in DOMAINS[:2]:
        account = run.ledger.account(name)
        shares[name] = run.ledger.explained(name)
        lines[name] = {k: account[k].sum() for k in ("predicted", "carried", "decayed", "actual")}
        lines[name]["worst_step"] = account["residual"].abs().max()
    points = run.ledger.table("quadrature")["points"].mean() if "quadrature" in run.ledger.tables else 1.0
    return {"explained": shares, "lines": lines, "points": points}


def experiment() -> dict[str, Any]:
    """Explained share of each target's drop, by learning rate and path."""
    table = []
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", assay.AssayWarning
        )  # of shares outside the band, which are the result
        for lr in RATES:
            for method, options in METHODS.items():
                table.append({"lr": lr, "method": method, **one(lr, options)})
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32, float32",
        "training": f"AdamW 0.9/0.95, decay 0.1, clipping {CLIP}, warm-up {WARMUP}, cosine, {STEPS} steps of {SAMPLES}",
        "seed": SEED,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("completeness", "paths.completeness", experiment)
