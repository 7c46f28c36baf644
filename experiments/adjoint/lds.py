"""Groups of samples out of the whole run, same seed and order: do the values of single samples add up to the effect?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import assay
from assay.evaluate import Removal, linear_datamodeling_score, occurrences
from experiments.adjoint import gpt, mnist
from experiments.adjoint.common import by_id
from experiments.command import run_as_command
from experiments.embeddings import mnist as embeddings_mnist
from experiments.truth import mnist as digits_truth
from experiments.truth import tiny_gpt
from experiments.truth.mnist import loss_fn

SHARES, GROUPS, SEED, OPTIMIZER, LR = (0.01, 0.5), 40, 0, "AdamW 5e-4", 5e-4


def groups(samples: int, share: float, seed: int) -> Tensor:
    """`[GROUPS, samples]`: random groups of that share."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(GROUPS, samples, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(samples, generator=generator)[: round(share * samples)]] = True
    return chosen


def removals(chosen: Tensor, order: Sequence[Sequence[int]]) -> list[Removal]:
    """All terms of each group's samples."""
    return [occurrences(order, row.nonzero().flatten().tolist(), range(len(order))) for row in chosen]


def rows(model: str, values: dict[str, tuple[assay.Ledger, Tensor]], samples: int, effects: Any) -> list[Any]:
    """Mean and spread of the score over the queries, by method and share."""
    table = []
    for method, (ledger, found) in values.items():
        for share, (chosen, truth) in effects.items():
            score = linear_datamodeling_score(by_id(ledger, found, samples), chosen, truth)
            row = {"model": model, "method": method, "share": share}
            table.append(row | {"lds": float(score.mean()), "lowest": float(score.min())})
            print(table[-1], flush=True)
    return table


def every_method(data: digits_truth.Digits) -> dict[str, tuple[assay.Ledger, Tensor]]:
    """`[queries, rows]` of all that assay has, on the run of digits."""
    found = mnist.values(OPTIMIZER, data)
    exact, _ = found["adjoint, hessian"]
    model, ledger = embeddings_mnist.record("AdamW", LR, data, assay.Projection(32, "pca"))
    for curvature in ("fisher", "ggn"):
        embeddings = ledger.embeddings(curvature=curvature, blocks="all")
        found[f"embeddings, {curvature}"] = exact, embeddings.influence(model, data.queries, loss_fn)
    found["influence function"] = (
        exact,
        embeddings_mnist.influence_function(model, data) / digits_truth.EPOCHS,
    )
    return found


def experiment() -> dict[str, Any]:
    """LDS of every method on both runs."""
    data, text = digits_truth.digits(SEED), tiny_gpt.corpus(SEED)
    table = []
    effects = {}
    for share in SHARES:
        chosen = groups(digits_truth.IMAGES, share, 2)
        effects[share] = chosen, digits_truth.truth(OPTIMIZER, data, removals(chosen, data.order), SEED)
    table += rows("MNIST-MLP", every_method(data), digits_truth.IMAGES, effects)
    effects = {}
    for share in SHARES:
        chosen = groups(tiny_gpt.SAMPLES, share, 2)
        effects[share] = chosen, tiny_gpt.truth(text, removals(chosen, text.order), SEED)
    table += rows("GPT", gpt.values(text), tiny_gpt.SAMPLES, effects)
    return {
        "models": {
            "MNIST-MLP": f"784-48-10, tanh, {OPTIMIZER}",
            "GPT": "2 layers of width 32, AdamW, clipping",
        },
        "groups": GROUPS,
        "shares": list(SHARES),
        "queries": {"MNIST-MLP": len(data.queries), "GPT": len(text.queries)},
        "seed": SEED,
        "magic": 0.931,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("adjoint_lds", "adjoint.lds", experiment)
