"""Data value embeddings against leaving samples out and training again: 1,000 digits, a perceptron, 4 epochs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import assay
from assay.embedding import Embeddings
from assay.evaluate import Removal, Training, leave_out
from experiments.command import run_parts_as_command
from experiments.embeddings import dense
from experiments.embeddings.common import spearman
from experiments.truth.mnist import Digits, digits, loss_fn, network, terms

RATES = {"SGD": (0.01, 0.05, 0.2), "AdamW": (1e-4, 5e-4, 2e-3)}
REMOVALS, QUERIES, SEED = 100, 50, 0
KINDS = ("single step", "last epoch", "all epochs")
PROJECTIONS = (("random", 16), ("pca", 8), ("pca", 16), ("pca", 32), ("pca", 48))
MAIN = ("pca", 32)  # the projection with which every form is tried
ANCHORS = (("SGD", 0.05), ("AdamW", 5e-4))  # where projections of all ranks are tried, and none


@dataclass(frozen=True)
class Truth:
    """What was left out, and what that did.

    Args:
        removals: by kind, (step, row) of every term that is dropped.
        effects: by kind, `[Q, removals]`.
    """

    removals: dict[str, list[Removal]]
    effects: dict[str, Tensor]


def build(name: str, lr: float, model: nn.Module) -> Optimizer:
    """The optimizer of a run."""
    return SGD(model.parameters(), lr=lr) if name == "SGD" else AdamW(model.parameters(), lr=lr)


def removals(data: Digits, seed: int = 1) -> dict[str, list[Removal]]:
    """Drawn at random: terms of single steps, terms of the last epoch, all terms of a sample."""
    generator = torch.Generator().manual_seed(seed)
    places = [(t, row) for t, ids in enumerate(data.order) for row in range(len(ids))]
    first = len(data.order) * 3 // 4
    last = [place for place in places if place[0] >= first]
    found: dict[str, list[Removal]] = {}
    for kind, among in (("single step", places), ("last epoch", last)):
        chosen = torch.randperm(len(among), generator=generator)[:REMOVALS].tolist()
        found[kind] = [[among[n]] for n in chosen]
    chosen = torch.randperm(len(data.images[0]), generator=generator)[:REMOVALS].tolist()
    where: dict[int, list[tuple[int, int]]] = {i: [] for i in chosen}
    for t, row in places:
        if data.order[t][row] in where:
            where[data.order[t][row]].append((t, row))
    found["all epochs"] = list(where.values())
    return found


def truth(name: str, lr: float, data: Digits, left_out: dict[str, list[Removal]]) -> Truth:
    """By honest retraining in float64."""
    model = network()
    batches = [[data.batch(ids)] for ids in data.order]
    run = Training(model, build(name, lr, model), batches, terms)
    everything = [removal for kind in KINDS for removal in left_out[kind]]
    effects = leave_out(run, everything, data.queries, loss_fn, chunk=50)
    return Truth(left_out, dict(zip(KINDS, effects.split(REMOVALS, 1), strict=True)))


def record(
    name: str, lr: float, data: Digits, projection: assay.Projection
) -> tuple[nn.Module, assay.Ledger]:
    """The run with its gradients recorded, the Gauss-Newton matrix as well."""
    model = network()
    optimizer = build(name, lr, model)
    axes = assay.Target([data.images], loss_fn) if projection.kind == "pca" else None
    method = assay.DataValueEmbedding(projection, axes=axes, curvature="ggn", draws="all", dtype="fp32")
    with assay.Run(model, optimizer, methods=[method]) as run:
        for ids in data.order:
            with run.step(ids):
                loss_fn(model, data.batch(ids)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return model, run.ledger


class Judge:
    """Sets scores of all rows beside the truth."""

    def __init__(self, data: Digits, found: Truth, where: dict[str, Any]) -> None:
        self.found, self.where, self.table = found, where, list[dict[str, Any]]()
        starts = torch.tensor([0, *(len(ids) for ids in data.order)]).cumsum(0).tolist()
        self.rows = {
            kind: [[starts[t] + row for t, row in removal] for removal in found.removals[kind]]
            for kind in KINDS
        }

    def take(self, method: str, scores: Tensor, **what: Any) -> None:
        """`[Q, rows]` scores of a method."""
        for kind in KINDS:
            own = torch.stack([scores[:, rows].sum(1) for rows in self.rows[kind]], 1)
            effect = self.found.effects[kind]
            row = {**self.where, "removal": kind, "method": method, **what, "spearman": spearman(own, effect)}
            self.table.append(row)


def influence_function(model: nn.Module, data: Digits) -> Tensor:
    """`[Q, rows]`: (F + λ I)⁻¹ at the end of training, the same for every step of a sample."""
    everything = [(list(range(len(data.images[0]))), data.images)]
    index = assay.Index.build(
        model, everything, loss_fn, projection=assay.Projection(rank=32, kind="pca"), dtype="fp32"
    )
    scores = index.influence(model, data.queries, loss_fn)
    return scores[:, [i for ids in data.order for i in ids]]


def dot(found: Embeddings, model: nn.Module, data: Digits, ledger: assay.Ledger) -> Tensor:
    """`[Q, rows]`: the gradient of the query at the end times that of the sample in its step."""
    from assay.embedding.recorded import Recorded

    recorded = Recorded(ledger._source.gradients)
    return found.project(model, data.queries, loss_fn) @ recorded.read(0, len(found))[:, 0].t()


def judge_projected(judge: Judge, name: str, lr: float, data: Digits) -> None:
    """All forms of the embedding, by projection."""
    for kind, rank in PROJECTIONS if (name, lr) in ANCHORS else (PROJECTIONS[0], MAIN):
        model, ledger = record(name, lr, data, assay.Projection(rank, kind))  # type: ignore[arg-type]
        momenta = (True, False) if name == "AdamW" else (False,)
        every = [(c, b, momenta[0]) for c in ("fisher", "ggn") for b in ("layer", "all")]
        every += [(c, "all", False) for c in ("fisher", "ggn")] if name == "AdamW" else []
        few = [("fisher", "layer", momenta[0]), ("ggn", "all", momenta[0])]
        for curvature, blocks, momentum in every if (kind, rank) == MAIN else few:
            found = ledger.embeddings(2, curvature, blocks=blocks, momentum=momentum)  # type: ignore[arg-type]
            judge.take(
                "embedding", found.influence(model, data.queries, loss_fn), projection=f"{kind} {rank}",
                curvature=curvature, blocks=blocks, momentum=momentum,
            )  # fmt: skip
        if (kind, rank) == MAIN:
            judge.take("dot product", dot(found, model, data, ledger))
            judge.take("influence function", influence_function(model, data))


def judge_dense(judge: Judge, name: str, lr: float, data: Digits) -> None:
    """The same with nothing projected."""
    batches = [
        tuple(part.float() for part in data.batch(ids)[:1]) + data.batch(ids)[1:] for ids in data.order
    ]
    queries = [(x.float(), y) for x, y in data.queries]
    adam = name == "AdamW"
    path = dense.train(network(dtype=torch.float32), batches, adam, lr, 0.01 if adam else 0.0)  # type: ignore[arg-type]
    forms = [("fisher", "layer", adam, "both"), ("fisher", "all", adam, "both"), ("ggn", "all", adam, "both")]
    if adam:
        forms += [("ggn", "all", False, "both"), ("ggn", "all", True, "root")]
    for (curvature, blocks, momentum, coordinates), scores in dense.influence(path, queries, forms).items():
        judge.take(
            "embedding", scores, projection="none" if coordinates == "both" else "none, √K", curvature=curvature,
            blocks=blocks, momentum=momentum,
        )  # fmt: skip


def compare(name: str, lr: float) -> list[dict[str, Any]]:
    """Spearman over the removals, the mean over the queries, for one run."""
    data = digits(SEED, queries=QUERIES)
    judge = Judge(data, truth(name, lr, data, removals(data)), {"optimizer": name, "lr": lr})
    judge_projected(judge, name, lr, data)
    if (name, lr) in ANCHORS:
        judge_dense(judge, name, lr, data)
    return judge.table


def runs() -> list[tuple[str, float]]:
    """The anchors first."""
    return sorted(
        ((name, lr) for name, rates in RATES.items() for lr in rates), key=lambda run: run not in ANCHORS
    )


if __name__ == "__main__":
    run_parts_as_command(
        "embeddings_mnist",
        "embeddings.mnist",
        {f"{name} {lr:g}": partial(compare, name, lr) for name, lr in runs()},
        {
            "model": "784-48-10 tanh network, 38,170 parameters",
            "training": "1,000 images, 4 epochs, batches of 32, 128 steps",
            "removals": REMOVALS,
            "queries": QUERIES,
            "seed": SEED,
        },
    )
