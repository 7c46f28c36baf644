"""Linear datamodeling scores on a tiny GPT over bytes: every method, damping and rank, and other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.demo.gpt import GPT, GPTConfig
from assay.evaluate.subsets import SubsetTraining
from experiments.command import run_as_command
from experiments.index.common import LINEAR_METHODS, METHODS, Task, attribute, difference
from experiments.index.peers import compare_peers
from experiments.paths.common import CONTEXT, mixture, rows

DOMAINS = ("python_code", "bible", "speeches")
EXAMPLES, QUERIES = 256, 240


def make_model() -> nn.Module:
    """2 layers of width 32 over bytes, about 30,000 parameters."""
    return GPT(GPTConfig(vocabulary=128, context=CONTEXT, layers=2, heads=2, width=32))


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """`[B]`: each row's mean cross-entropy of the next byte."""
    logits = model(batch[0])  # [B, T, V]
    return F.cross_entropy(logits.transpose(1, 2), batch[1], reduction="none").mean(1)


def adamw(params: Any) -> torch.optim.Optimizer:
    """As small GPTs are trained."""
    return torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)


def pair(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of `[rows, CONTEXT + 1]` bytes."""
    return tokens[:, :-1], tokens[:, 1:]


def task() -> Task:
    """Rows of three domains, and held-out rows of the same."""
    asked = torch.cat([rows(name, QUERIES // len(DOMAINS), skip=4000) for name in DOMAINS])
    return Task(
        make_model, losses,
        data=pair(mixture(DOMAINS, EXAMPLES, seed=0)), queries=pair(asked),
        training=SubsetTraining(adamw, epochs=12, batch=32),
        subsets=64, seeds=range(4), checkpoints=range(3), rank=16,
        methods=METHODS | LINEAR_METHODS,
    )  # fmt: skip


def experiment(cache: Path) -> dict[str, Any]:
    """All methods against retraining on 64 halves of the rows."""
    gpt = task()
    truth = gpt.truth(cache / "gpt")
    table, per_query, sweep = attribute(gpt, truth)
    steps = [
        ("EKFAC, no projection", "LoGra-random"),
        ("EKFAC, no projection, linear weights only", "EKFAC, no projection"),
        ("LoGra-random", "LoGra-PCA"),
        ("LoGra-random", "plain dot product"),
    ]
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32",
        "training": f"{EXAMPLES} rows of {', '.join(DOMAINS)}; AdamW 3e-3, decay 0.01, 12 epochs of batches of 32",
        "truth": f"{gpt.subsets} subsets of half the rows, each trained with {len(gpt.seeds)} seeds",
        "queries": QUERIES,
        "checkpoints": list(gpt.checkpoints),
        "rank": gpt.rank,
        "table": table,
        "differences": [
            {"better": a, "worse": b, **difference(per_query[a], per_query[b])} for a, b in steps
        ],
        "sweep": sweep,
        "peers": compare_peers(gpt, truth),
    }


if __name__ == "__main__":
    run_as_command("index_gpt", "index.gpt", experiment, cached=True)
