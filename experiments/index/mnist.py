"""Linear datamodeling scores on an MLP and 1,000 real digits: every method, damping and rank, and other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.evaluate.subsets import SubsetTraining
from experiments.command import run_as_command
from experiments.index.common import Task, attribute, difference
from experiments.index.peers import compare_peers

DIGITS = Path(__file__).parents[3] / "shared" / "data" / "mnist10k.npz"
EXAMPLES, QUERIES = 1000, 500


def make_model() -> nn.Module:
    """784-48-24-10."""
    return nn.Sequential(nn.Linear(784, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10))


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """`[B]` cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def sgd(params: Any) -> torch.optim.Optimizer:
    """Heavy ball with weight decay."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def task() -> Task:
    """The digits and how they are learned."""
    found = np.load(DIGITS)
    x = torch.from_numpy(found["x"]).float().flatten(1) / 255
    y = torch.from_numpy(found["y"]).long()
    return Task(
        make_model, losses,
        data=(x[:EXAMPLES], y[:EXAMPLES]), queries=(x[-QUERIES:], y[-QUERIES:]),
        training=SubsetTraining(sgd, epochs=15, batch=50),
        subsets=100, seeds=range(10), checkpoints=range(5), rank=16,
    )  # fmt: skip


def experiment(cache: Path) -> dict[str, Any]:
    """All methods against retraining on 100 halves of the digits."""
    mnist = task()
    truth = mnist.truth(cache / "mnist")
    table, per_query, sweep = attribute(mnist, truth)
    steps = [
        ("EKFAC, no projection", "LoGra-PCA"),
        ("LoGra-PCA", "LoGra-random"),
        ("LoGra-random", "plain dot product"),
    ]
    return {
        "model": "MLP 784-48-24-10, ReLU",
        "training": f"{EXAMPLES} digits, SGD 0.05 with momentum 0.9 and decay 1e-3, 15 epochs of batches of 50",
        "truth": f"{mnist.subsets} subsets of half the digits, each trained with {len(mnist.seeds)} seeds",
        "queries": QUERIES,
        "checkpoints": list(mnist.checkpoints),
        "rank": mnist.rank,
        "table": table,
        "differences": [
            {"better": a, "worse": b, **difference(per_query[a], per_query[b])} for a, b in steps
        ],
        "sweep": sweep,
        "peers": compare_peers(mnist, truth),
    }


if __name__ == "__main__":
    run_as_command("index_mnist", "index.mnist", experiment, cached=True)
