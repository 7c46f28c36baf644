"""How close: in-run values to the Shapley values of a step, embeddings to leaving a term of a step out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import assay
from experiments.adjoint.common import dot_products, in_run_values, places, spearman
from experiments.command import run_seeds_as_command
from experiments.evidence.shape import estimate
from experiments.paths.fidelity import PATHS, compare
from experiments.settings import Settings
from experiments.truth.mnist import build, digits, loss_fn, network, removals, truth

SETTINGS = Path(__file__).with_suffix(".yaml")


class FidelitySettings(Settings):
    """The learning rates of the GPT's step, the runs of the perceptron, and how much is left out."""

    rates: list[float]
    permutations: int
    runs: list[str]
    removals: int
    queries: int
    rank: int


def one(settings: FidelitySettings, seed: int, cache: Path) -> dict[str, Any]:
    """Of one seed: rows by learning rate and path, and the correlation of every method by run."""
    steps = [row for lr in settings.rates for row in compare(lr, seed, settings.permutations)]
    print(f"seed {seed}: steps are done", flush=True)
    return {"steps": steps, "runs": {name: left_out(settings, name, seed) for name in settings.runs}}


def left_out(s: FidelitySettings, name: str, seed: int) -> dict[str, float]:
    """Spearman's correlation with retraining, the mean over the queries, by method."""
    data = digits(seed, queries=s.queries)
    removed = removals(data, s.removals, seed + 1)
    effects = truth(name, data, removed, seed)
    found: dict[str, float] = {}

    rows: list[int] = []

    def take(method: str, values: Tensor) -> None:
        found[method] = spearman(values[:, rows], effects)
        print(f"seed {seed} {name} {method}: {found[method]:.3f}", flush=True)

    targets = {str(i): assay.Target([query], loss_fn) for i, query in enumerate(data.queries)}
    axes = assay.Target([data.images], loss_fn)
    for path in ("left", "trapezoid"):
        model = network(seed)
        optimizer = build(name, model)
        methods: list[Any] = [assay.InRunShapley(targets, path=path, band=(0.0, 1e9))]
        if path == "left":
            projection = assay.Projection(rank=s.rank, kind="pca")
            methods.append(
                assay.DataValueEmbedding(projection, axes=axes, curvature="ggn", draws="all", dtype="fp32")
            )
        with assay.Run(model, optimizer, methods=methods) as run:
            for ids in data.order:
                with run.step(ids):
                    loss_fn(model, data.batch(ids)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        if not rows:  # of the run that recorded them; the order is that of both
            rows = places(run.ledger, removed)
        take(f"in-run, {path}", in_run_values(run.ledger))
        if path == "left":
            for curvature in ("fisher", "ggn"):
                embeddings = run.ledger.embeddings(curvature=curvature, blocks="all")  # type: ignore[arg-type]
                take(f"embeddings, {curvature}", embeddings.influence(model, data.queries, loss_fn))
            dots = dot_products(
                model, data.queries, loss_fn, [data.batch([i]) for i in range(len(data.images[0]))]
            )
            take("dot product", dots[:, run.ledger.rows["id"].to_list()])
    return found


def summary(settings: FidelitySettings, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds with their intervals."""
    steps = []
    for n, (lr, path) in enumerate((lr, path) for lr in settings.rates for path in PATHS):
        own = [seed["steps"][n] for seed in seeds]
        assert all((row["lr"], row["path"]) == (lr, path) for row in own)
        figures = {name: estimate(row[name] for row in own) for name in ("rmse", "spearman", "size")}
        steps.append({"lr": lr, "path": path, **figures})
    runs = {
        name: {
            method: estimate(seed["runs"][name][method] for seed in seeds)
            for method in seeds[0]["runs"][name]
        }
        for name in settings.runs
    }
    return {"steps": steps, "runs": runs}


if __name__ == "__main__":
    run_seeds_as_command("fidelity_seeds", "evidence.fidelity", (FidelitySettings, SETTINGS), one, summary)
