"""Every method on the same truth: the linear datamodeling score, and what taking away the best examples does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.evaluate.baselines import (
    BM25,
    Adjoint,
    Cosine,
    DotProduct,
    Embeddings,
    FeatureSimilarity,
    FinalLoss,
    GradientNorm,
    Influence,
    InRun,
    KNNShapley,
    Random,
    RetrainingShapley,
    Scorer,
    SelfInfluence,
    TextSimilarity,
    TracIn,
    Trak,
    score,
    unavailable,
)
from assay.evaluate.intervals import mean_with_interval
from assay.evaluate.retraining import brittleness
from assay.evaluate.subsets import SubsetTraining, SubsetTruth, draw_subsets
from assay.evaluate.task import SubsetLoop, Task
from experiments.command import Pieces, run_seeds_as_command
from experiments.evidence.images import correct, features, load, losses, network, sgd
from experiments.index import gpt
from experiments.paths.common import mixture, rows
from experiments.settings import Settings

SETTINGS = Path(__file__).with_suffix(".yaml")
MODELS = ("MNIST-MLP", "tiny GPT")


class EffectSettings(Settings):
    """Sizes; where there are two, the first is the perceptron's and the second the GPT's."""

    examples: tuple[int, int]
    queries: tuple[int, int]
    asked: tuple[int, int]
    subsets: tuple[int, int]
    retrained: tuple[int, int]
    counts: tuple[list[int], list[int]]
    epochs: tuple[int, int]
    batch: tuple[int, int]
    orders: tuple[int, int]
    stride: tuple[int, int]
    dimension: int
    rank: int
    width: int


def digits(s: EffectSettings, seed: int) -> Task:
    """A perceptron on real digits, float64; the data is the same for every seed of the training."""
    x, y = load("MNIST")
    x = x.double()
    data, queries = (x[: s.examples[0]], y[: s.examples[0]]), (x[-s.queries[0] :], y[-s.queries[0] :])
    training = SubsetTraining(sgd(0.1), epochs=s.epochs[0], batch=s.batch[0])
    loop = SubsetLoop(partial(network, s.width, torch.float64), losses, data, training, seed)
    return Task(losses, data, queries, loop, features=features, labels=(data[1], queries[1]))


def text(s: EffectSettings, seed: int) -> Task:
    """A GPT on bytes of three domains."""
    data = mixture(gpt.DOMAINS, s.examples[1], seed=0)
    each = -(-s.queries[1] // len(gpt.DOMAINS))
    asked = torch.stack([rows(name, each, skip=4000) for name in gpt.DOMAINS], 1).flatten(0, 1)[
        : s.queries[1]
    ]
    training = SubsetTraining(gpt.adamw, epochs=s.epochs[1], batch=s.batch[1])
    loop = SubsetLoop(gpt.make_model, gpt.losses, gpt.pair(data), training, seed)
    texts = [[bytes(row).decode() for row in part.tolist()] for part in (data, asked)]
    return Task(gpt.losses, gpt.pair(data), gpt.pair(asked), loop, texts=(texts[0], texts[1]), outputs="head")


def methods(s: EffectSettings, seed: int, model: int) -> list[Scorer]:
    """Everything that can be asked."""
    return [
        Random(seed), FinalLoss(), GradientNorm(), SelfInfluence(s.rank), DotProduct(), Cosine(), TracIn(5),
        Trak(s.dimension), KNNShapley(5), KNNShapley(5, features=True), FeatureSimilarity(), BM25(),
        TextSimilarity(), RetrainingShapley(s.orders[model], s.stride[model], seed=seed), InRun("left"),
        InRun("hessian"), InRun("trapezoid"), InRun("left", even=True),
        Embeddings("fisher", s.rank), Embeddings("ggn", s.rank),
        Influence("logra", s.rank), Influence("logra-pca", s.rank), Influence("ekfac"), Adjoint("ggn"),
        Adjoint("hessian"),
    ]  # fmt: skip


def truth(s: EffectSettings, task: Task, model: int, cache: Path) -> SubsetTruth:
    """Losses of the queries after training on halves, kept for the other seeds."""
    kept = draw_subsets(task.examples, s.subsets[model])
    found = task.loop.retrain(
        kept, task.queries, task.losses, seeds=range(100, 100 + s.retrained[model]), cache=cache
    )
    return SubsetTruth(kept, found.mean(0))


def one(settings: EffectSettings, seed: int, cache: Path) -> dict[str, Any]:
    """Of each model and method: `[queries]` scores, rises and flips."""
    pieces = Pieces(cache / "effects" / f"seed{seed}", settings)
    found: dict[str, Any] = {}
    for model, name in enumerate(MODELS):
        task = (digits, text)[model](settings, seed)
        halves = truth(settings, task, model, cache / "effects" / name)
        found[name] = {
            method.name: pieces.once(
                f"{name}, {method.name}", partial(judge, settings, task, model, seed, halves, method)
            )
            for method in methods(settings, seed, model)
            if unavailable(method, task) is None
        }
    return {**found, "found_seconds": pieces.seconds}


def judge(
    s: EffectSettings, task: Task, model: int, seed: int, halves: SubsetTruth, method: Scorer
) -> dict[str, Any]:
    """The same for one model and method."""
    scores = score(method, task)
    values = scores.values.expand(task.asked, -1)
    taken = taken_away(s, task, values[: s.asked[model]], model, seed)
    found = {"lds": halves.score(values).per_query.tolist(), "seconds": scores.seconds, **taken}
    lds = sum(found["lds"]) / task.asked
    print(f"{MODELS[model]} seed {seed} {scores.name}: {lds:.3f} in {scores.seconds:.1f} s", flush=True)
    return found


def taken_away(s: EffectSettings, task: Task, values: Tensor, model: int, seed: int) -> dict[str, Any]:
    """Rise of the loss, `[counts, asked]`, and flips, `[counts, asked]` or None."""
    few = Task(task.losses, task.data, tuple(x[: len(values)] for x in task.queries), task.loop)
    known = correct if model == 0 else None
    found = brittleness(few, values, s.counts[model], known, seeds=[seed])
    flips = [[None if x != x else x for x in row] for row in found.flipped.tolist()]
    return {"rise": found.rise.tolist(), "flipped": flips if model == 0 else None}


def summary(settings: EffectSettings, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds and queries, with bootstrap intervals over the queries."""
    tables: dict[str, Any] = {}
    for i, name in enumerate(MODELS):
        own = [seed[name] for seed in seeds]
        tables[name] = [
            {
                "method": method,
                "lds": over_queries([r[method]["lds"] for r in own]),
                "rise": [
                    over_queries([r[method]["rise"][c] for r in own]) for c in range(len(settings.counts[i]))
                ],
                "flipped": None
                if own[0][method]["flipped"] is None
                else [
                    over_queries([r[method]["flipped"][c] for r in own])
                    for c in range(len(settings.counts[i]))
                ],
                "seconds": sum(r[method]["seconds"] for r in own) / len(own),
            }
            for method in own[0]
        ]
    return {"tables": tables}


def over_queries(found: list[list[float | None]]) -> dict[str, float | int | None]:
    """The mean over seeds, then over the queries; a query that is None in every seed has no say."""
    kept = [[x for x in column if x is not None] for column in zip(*found, strict=True)]
    means = torch.tensor([sum(column) / len(column) for column in kept if column], dtype=torch.float64)
    if not len(means):
        return {"mean": float("nan"), "low": None, "high": None, "n": 0}
    score = mean_with_interval(means)
    ends = (score.low, score.high)
    low, high = (end if end == end else None for end in ends)
    return {"mean": score.mean, "low": low, "high": high, "n": len(means)}


if __name__ == "__main__":
    run_seeds_as_command("effects", "evidence.effects", (EffectSettings, SETTINGS), one, summary)
