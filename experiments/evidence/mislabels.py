"""Flipped labels among real images: which method finds them, and whose selection is worth training on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from assay.evaluate.baselines import (
    Adjoint,
    Cosine,
    DotProduct,
    Embeddings,
    FinalLoss,
    GradientNorm,
    Influence,
    InRun,
    KNNShapley,
    Random,
    RetrainingShapley,
    Scorer,
    SelfInfluence,
    TracIn,
    Trak,
    score,
)
from assay.evaluate.metrics import best, detection
from assay.evaluate.subsets import SubsetTraining
from assay.evaluate.task import SubsetLoop, Task
from experiments.command import run_seeds_as_command
from experiments.evidence.images import Images, correct, features, load, losses, network, sgd
from experiments.evidence.shape import estimate
from experiments.settings import Settings

SETTINGS = Path(__file__).with_suffix(".yaml")


class MislabelSettings(Settings):
    """The images, the network and its training, and what is tried on them."""

    datasets: list[str]
    examples: int
    flipped: float
    validation: int
    test: int
    width: int
    rate: float
    epochs: int
    batch: int
    shares: list[float]
    orders: int
    stride: int
    dimension: int
    rank: int


def draw(s: MislabelSettings, name: str, seed: int) -> tuple[Images, torch.Tensor, Images, Images]:
    """Training images, which of them have a flipped label, validation images and test images."""
    x, y = load(name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    parts = torch.split(
        order, [s.examples, s.validation, s.test, len(x) - s.examples - s.validation - s.test]
    )
    train, validation, test = ((x[rows], y[rows]) for rows in parts[:3])
    planted = torch.zeros(s.examples, dtype=torch.bool)
    planted[torch.randperm(s.examples, generator=generator)[: round(s.flipped * s.examples)]] = True
    other = (train[1] + torch.randint(1, 10, (s.examples,), generator=generator)) % 10
    return (train[0], train[1].where(~planted, other)), planted, validation, test


def methods(s: MislabelSettings, seed: int) -> list[Scorer]:
    """Everything that can be asked."""
    return [
        Random(seed), FinalLoss(), GradientNorm(), SelfInfluence(s.rank), DotProduct(), Cosine(), TracIn(5),
        Trak(s.dimension), KNNShapley(5), KNNShapley(5, features=True),
        RetrainingShapley(s.orders, s.stride, seed=seed),
        InRun("left"), InRun("hessian"), InRun("trapezoid"), Embeddings("fisher", s.rank),
        Embeddings("ggn", s.rank), Influence("logra", s.rank), Influence("logra-pca", s.rank), Influence("ekfac"),
        Adjoint("ggn"),
    ]  # fmt: skip


def one(settings: MislabelSettings, seed: int, cache: Path) -> dict[str, Any]:
    """AUROC and AUPRC of each method, and the accuracy after training on its selections."""
    return {name: judge(settings, name, seed) for name in settings.datasets}


def judge(s: MislabelSettings, name: str, seed: int) -> dict[str, Any]:
    """The same for one data set."""
    data, planted, validation, test = draw(s, name, seed)
    training = SubsetTraining(sgd(s.rate), epochs=s.epochs, batch=s.batch)
    loop = SubsetLoop(partial(network, s.width), losses, data, training, seed)
    task = Task(
        losses, data, validation, loop, together=True, features=features, labels=(data[1], validation[1])
    )
    found: dict[str, dict[str, Any]] = {}
    kept = [torch.ones(s.examples, dtype=torch.bool), ~planted]
    for method in methods(s, seed):
        scores = score(method, task)
        told = detection(-scores.values[0], planted, resamples=0)
        found[scores.name] = {
            "auroc": told.auroc.mean, "auprc": told.auprc.mean, "seconds": scores.seconds,
        }  # fmt: skip
        kept += [best(scores.values[0], share) for share in s.shares]
        print(
            f"{name} seed {seed} {scores.name}: {told.auroc.mean:.3f} in {scores.seconds:.1f} s", flush=True
        )
    right = loop.retrain(torch.stack(kept), test, correct, seeds=(seed,))
    accuracy = right.mean((0, 2)).tolist()
    for i, row in enumerate(found.values()):
        row["accuracy"] = accuracy[2 + i * len(s.shares) : 2 + (i + 1) * len(s.shares)]
    return {"methods": found, "everything": accuracy[0], "clean": accuracy[1]}


def summary(settings: MislabelSettings, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds with their intervals."""
    tables = {}
    for name in settings.datasets:
        own = [seed[name] for seed in seeds]
        tables[name] = {
            "everything": estimate(r["everything"] for r in own),
            "clean": estimate(r["clean"] for r in own),
            "rows": [
                {
                    "method": method,
                    "auroc": estimate(r["methods"][method]["auroc"] for r in own),
                    "auprc": estimate(r["methods"][method]["auprc"] for r in own),
                    "accuracy": [
                        estimate(r["methods"][method]["accuracy"][i] for r in own)
                        for i in range(len(settings.shares))
                    ],
                    "seconds": sum(r["methods"][method]["seconds"] for r in own) / len(own),
                }
                for method in own[0]["methods"]
            ],
        }
    return {"tables": tables}


if __name__ == "__main__":
    run_seeds_as_command("mislabels", "evidence.mislabels", (MislabelSettings, SETTINGS), one, summary)
