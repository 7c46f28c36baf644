"""One sample's term out of one step of a perceptron on real digits: every method against honest retraining."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import assay
from experiments.adjoint.common import (
    PATHS,
    Watched,
    dot_products,
    in_run_values,
    places,
    spearman,
)
from experiments.command import run_as_command
from experiments.truth.mnist import (
    BATCH,
    EPOCHS,
    IMAGES,
    OPTIMIZERS,
    QUERIES,
    REMOVALS,
    Digits,
    build,
    digits,
    loss_fn,
    network,
    removals,
    truth,
)

SEED = 0


def watched(name: str, data: Digits, path: str) -> Watched:
    """The run with snapshots, every query a target of in-run values."""
    model = network(SEED, data.images[0].dtype)
    optimizer = build(name, model)
    targets = {str(i): assay.Target([query], loss_fn) for i, query in enumerate(data.queries)}
    methods = [assay.InRunShapley(targets, path=path, band=(0.0, 1e9))]
    with assay.Run(model, optimizer, methods=methods, snapshots="auto") as run:
        for ids in data.order:
            with run.step(ids):
                loss_fn(model, data.batch(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return run.ledger, model, optimizer


def values(name: str, data: Digits) -> dict[str, tuple[assay.Ledger, Tensor]]:
    """`[queries, rows]` by method."""
    found = {}
    for path in PATHS:
        ledger, model, optimizer = watched(name, data, path)
        found[f"in-run, {path}"] = ledger, in_run_values(ledger)
    samples = [data.batch([i]) for i in range(IMAGES)]
    dots = dot_products(model, data.queries, loss_fn, samples)
    found["dot product"] = ledger, dots[:, ledger.rows["id"].to_list()]
    for kind in ("ggn", "hessian"):
        found[f"adjoint, {kind}"] = ledger, ledger.adjoint(
            model, optimizer, lambda t: [(data.order[t], data.batch(data.order[t]))], loss_fn,
            data.queries, curvature=kind,
        )  # fmt: skip
    return found


def experiment() -> dict[str, Any]:
    """Spearman against retraining, by optimizer and method."""
    data = digits(SEED)
    removed = removals(data)
    table = []
    for name in OPTIMIZERS:
        effects = truth(name, data, removed, SEED)
        for method, (ledger, found) in values(name, data).items():
            row = spearman(found[:, places(ledger, removed)], effects)
            table.append({"optimizer": name, "method": method, "spearman": row})
            print(name, method, row, flush=True)
    return {
        "model": "784-48-10, tanh, float64",
        "data": f"{IMAGES} digits, {EPOCHS} epochs, batches of {BATCH}",
        "removals": REMOVALS,
        "queries": QUERIES,
        "seed": SEED,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("adjoint_mnist", "adjoint.mnist", experiment)
