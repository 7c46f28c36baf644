"""What the experiments on the influence index share: the settings that are compared, and how a result is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import assay
from assay.evaluate.intervals import mean_with_interval
from assay.evaluate.subsets import SubsetTraining, SubsetTruth, draw_subsets, subset_truth, train_on_subsets

DAMPINGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Task:
    """A model, its data and its training.

    Args:
        make_model: gives a new model.
        losses: `losses(model, rows)` returns `[B]`.
        data: the training examples.
        queries: what is asked.
        training: the settings.
        subsets: how many subsets of half the examples the truth has.
        seeds: of the retrainings.
        checkpoints: seeds of the models that are attributed.
        rank: of the projections.
        methods: what is compared: by name, the kind of index and of curvature.
    """

    make_model: Callable[[], nn.Module]
    losses: Callable[[Any, Any], Tensor]
    data: Any
    queries: Any
    training: SubsetTraining
    subsets: int
    seeds: Sequence[int]
    checkpoints: Sequence[int]
    rank: int
    methods: Mapping[str, tuple[str, str]] = field(default_factory=lambda: METHODS)

    @property
    def examples(self) -> int:
        """N."""
        return len(first(self.data))

    def checkpoint(self, seed: int) -> nn.Module:
        """The model trained on everything."""
        everything = torch.ones(1, self.examples, dtype=torch.bool)
        weights = train_on_subsets(self.make_model, self.losses, self.data, everything, self.training, seed)
        model = self.make_model()
        model.load_state_dict({name: w[0] for name, w in weights.items()}, strict=False)
        return model.eval()

    def truth(self, cache: Path | None) -> SubsetTruth:
        """Losses of the queries after training on each subset."""
        return subset_truth(
            self.make_model, self.losses, self.data, self.queries, self.training,
            kept=draw_subsets(self.examples, self.subsets), seeds=self.seeds, cache=cache, at_once=50,
        )  # fmt: skip

    def batches(self) -> list[tuple[list[int], Any]]:
        """The training examples as `Index.build` takes them."""
        return [
            (list(range(i, min(i + 100, self.examples))), rows(self.data, i, i + 100))
            for i in range(0, self.examples, 100)
        ]

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch."""
        return self.losses(model, batch).mean()


def first(data: Any) -> Tensor:
    """The first tensor of a tuple, or the tensor itself."""
    return data if isinstance(data, Tensor) else data[0]


def rows(data: Any, start: int, stop: int) -> Any:
    """Some rows of all tensors."""
    return data[start:stop] if isinstance(data, Tensor) else tuple(x[start:stop] for x in data)


METHODS: dict[str, tuple[str, str]] = {
    "plain dot product": ("none", "identity"),
    "LoGra-random": ("random", "fisher"),
    "LoGra-PCA": ("pca", "fisher"),
    "KFAC, no projection": ("axes", "kfac"),
    "EKFAC, no projection": ("axes", "ekfac"),
}
LINEAR_METHODS: dict[str, tuple[str, str]] = {
    "LoGra-random, linear weights only": ("linear random", "fisher"),
    "EKFAC, no projection, linear weights only": ("linear axes", "ekfac"),
}


def build(task: Task, model: nn.Module, kind: str, seed: int = 0) -> assay.Index:
    """An index in memory; "axes" turns to all principal axes and keeps everything, "linear" leaves all else out."""
    linear, kind = kind.startswith("linear "), kind.removeprefix("linear ")
    rank = None if kind == "axes" else task.rank
    projection = assay.Projection(rank=rank, kind="pca" if kind == "axes" else kind, seed=seed)  # type: ignore[arg-type]
    return assay.Index.build(
        model, task.batches(), task.loss_fn, projection=projection, dtype="fp32",
        layers=[nn.Linear] if linear else None, exclude=["*bias"] if linear else (),
    )  # fmt: skip


def attribute(
    task: Task, truth: SubsetTruth
) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[dict[str, Any]]]:
    """The table of methods, each one's `[Q]` scores at damping 0.1, and the sweep of damping (and rank).

    Scores are averaged over the checkpoints, query by query.
    """
    sweeps: dict[tuple[str, int | None, float], list[float]] = {}
    held_out: dict[str, list[float]] = {}
    at_default: dict[str, list[Tensor]] = {}
    together: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {}
    for seed in task.checkpoints:
        model = task.checkpoint(seed)
        for kind in dict.fromkeys(kind for kind, _ in task.methods.values()):
            started = time.perf_counter()
            index = build(task, model, kind, seed)
            built = time.perf_counter() - started
            for name, (of, curvature) in task.methods.items():
                if of != kind:
                    continue
                started = time.perf_counter()
                scores = index.influence(model, [task.queries], task.loss_fn, 0.1, None, curvature)  # type: ignore[arg-type]
                times.setdefault(name, []).append(built + time.perf_counter() - started)
                at_default.setdefault(name, []).append(truth.score(scores).per_query)
                together[name] = together.get(name, torch.zeros(())) + scores
                ranks = (
                    (None, task.rank // 2, task.rank // 4) if kind.endswith(("random", "pca")) else (None,)
                )
                found = index.tune(
                    model, [task.queries], task.loss_fn, truth, DAMPINGS, [curvature], ranks,  # type: ignore[list-item]
                )  # fmt: skip
                for row in found.table.to_dicts():
                    rank = task.rank if row["rank"] is None and len(ranks) > 1 else row["rank"]
                    sweeps.setdefault((name, rank, row["damping"]), []).append(row["score"])
                held_out.setdefault(name, []).append(found.held_out.mean)
    table, per_query = [], {}
    for name in task.methods:
        per_query[name] = torch.stack(at_default[name]).mean(0)
        score = mean_with_interval(per_query[name])
        ensemble = truth.score(together[name])
        table.append(
            {
                "method": name, "lds": score.mean, "low": score.low, "high": score.high,
                "held_out": sum(held_out[name]) / len(held_out[name]),
                "ensemble": ensemble.mean, "ensemble_low": ensemble.low, "ensemble_high": ensemble.high,
                "seconds": sum(times[name]) / len(times[name]),
            }
        )  # fmt: skip
    sweep = [
        {"method": name, "rank": rank, "damping": damping, "lds": sum(found) / len(found)}
        for (name, rank, damping), found in sweeps.items()
    ]
    return table, per_query, sweep


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """The mean of `[Q]` differences with its interval."""
    found = mean_with_interval(a - b)
    return {"mean": found.mean, "low": found.low, "high": found.high}
