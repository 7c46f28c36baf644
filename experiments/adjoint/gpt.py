"""One sample's term out of one step of a tiny GPT with AdamW and clipping: every method against honest retraining."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

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
from experiments.paths.common import loss_fn
from experiments.truth.tiny_gpt import (
    BATCH,
    CLIP,
    EPOCHS,
    LR,
    SAMPLES,
    STEPS,
    Bytes,
    corpus,
    network,
    optimizer_of,
    rate,
    truth,
)

REMOVALS, SEED = 100, 0


def watched(data: Bytes, path: str | None) -> Watched:
    """The run with snapshots, every query a target of in-run values."""
    model = network(SEED)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    targets = {str(i): assay.Target([query], loss_fn) for i, query in enumerate(data.queries)}
    methods = [assay.InRunShapley(targets, path=path, band=(0.0, 1e9))] if path else []
    with assay.Run(model, optimizer, methods=methods, snapshots="auto") as run:
        for ids in data.order:
            with run.step(ids):
                loss_fn(model, data.batch(ids)).backward()
            clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return run.ledger, model, optimizer


def values(data: Bytes) -> dict[str, tuple[assay.Ledger, Tensor]]:
    """`[queries, rows]` by method."""
    found = {}
    for path in PATHS:
        ledger, model, optimizer = watched(data, path)
        found[f"in-run, {path}"] = ledger, in_run_values(ledger)
    dots = dot_products(model, data.queries, loss_fn, [data.batch([i]) for i in range(SAMPLES)])
    found["dot product"] = ledger, dots[:, ledger.rows["id"].to_list()]
    for kind in ("ggn", "hessian"):
        found[f"adjoint, {kind}"] = ledger, ledger.adjoint(
            model, optimizer, lambda t: [(data.order[t], data.batch(data.order[t]))], loss_fn,
            data.queries, curvature=kind, outputs="head" if kind == "ggn" else None,
        )  # fmt: skip
    return found


def experiment() -> dict[str, Any]:
    """Spearman against retraining, by method."""
    data = corpus(SEED)
    terms = [(t, row) for t, ids in enumerate(data.order) for row in range(len(ids))]
    chosen = torch.randperm(len(terms), generator=torch.Generator().manual_seed(1))[:REMOVALS]
    removed = [[terms[i]] for i in chosen.tolist()]
    effects = truth(data, removed, SEED)
    table = []
    for method, (ledger, found) in values(data).items():
        row = spearman(found[:, places(ledger, removed)], effects)
        table.append({"method": method, "spearman": row})
        print(method, row, flush=True)
    return {
        "model": "GPT, 2 layers of width 32, bytes, context 32, float64",
        "training": f"AdamW 0.9/0.95, decay 0.1, peak lr {LR}, warm-up, cosine, clipping {CLIP}, {STEPS} steps, "
        f"batches of {BATCH} of {SAMPLES} rows, {EPOCHS} epochs",
        "removals": REMOVALS,
        "queries": len(data.queries),
        "seed": SEED,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("adjoint_gpt", "adjoint.gpt", experiment)
