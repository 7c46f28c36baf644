"""Data value embeddings on a small GPT: against retraining, for a target that came later, and over a run's stages."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.embedding.recorded import Recorded
from assay.evaluate import Removal, Training, leave_out
from experiments.command import run_parts_as_command
from experiments.embeddings.common import spearman
from experiments.paths.common import adamw, gpt, loss_fn, mixture, rows

DOMAINS = ("novels", "python_code", "formal_math")
ROWS, BATCH, EPOCHS, LR, CLIP, SEED = 320, 16, 4, 1e-3, 1.0, 0
REMOVALS, QUERIES = 30, 20
LONG = 240  # steps of the run whose stages are looked at
Method = tuple[str, str, bool]


def order(steps: int, seed: int = SEED) -> list[list[int]]:
    """The rows of every step, shuffled anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    while len(found) < steps:
        found += [ids.tolist() for ids in torch.randperm(ROWS, generator=generator).split(BATCH)]
    return found[:steps]


def factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the run, then a cosine to a tenth of the peak."""
    warm = steps // 10
    return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + cos(pi * (step - warm) / (steps - warm)))


def train(
    steps: int, methods: list[Any], dtype: torch.dtype = torch.float32, snapshots: str | None = None
) -> tuple[nn.Module, assay.Ledger]:
    """A run with its records."""
    data, model = mixture(DOMAINS, ROWS, SEED), gpt(SEED, dtype)
    optimizer = adamw(model, LR)
    with assay.Run(model, optimizer, methods=methods, snapshots=snapshots) as run:
        for t, ids in enumerate(order(steps)):
            for group in optimizer.param_groups:
                group["lr"] = LR * factor(t, steps)
            with run.step(ids):
                loss_fn(model, data[ids]).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return model, run.ledger


def terms(model: nn.Module, tokens: Tensor) -> Tensor:
    """`[B]`: each row's term of the mean over all tokens."""
    logits = model(tokens[:, :-1])  # [B, T, V]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.mean(1) / len(tokens)


def queries() -> list[Tensor]:
    """Held-out rows of all domains."""
    each = -(-QUERIES // len(DOMAINS))
    held = torch.cat([rows(name, each, skip=4000) for name in DOMAINS])[:QUERIES]
    return list(held.split(1))


def axes_of(kind: str) -> assay.Target | None:
    """The examples whose covariances give the axes, where there are any."""
    return assay.Target([mixture(DOMAINS, 64, SEED)], loss_fn) if kind == "pca" else None


def fidelity() -> list[dict[str, Any]]:
    """Spearman against retraining, by removal and form."""
    steps = ROWS // BATCH * EPOCHS
    data, seen = mixture(DOMAINS, ROWS, SEED), order(steps)
    generator = torch.Generator().manual_seed(1)
    places = [(t, row) for t, ids in enumerate(seen) for row in range(len(ids))]
    late = [place for place in places if place[0] >= steps * 3 // 4]
    left_out: dict[str, list[Removal]] = {
        kind: [[among[n]] for n in torch.randperm(len(among), generator=generator)[:REMOVALS].tolist()]
        for kind, among in (("single step", places), ("last epoch", late))
    }
    model = gpt(SEED, torch.float64)
    optimizer = adamw(model, LR)
    run = Training(
        model, optimizer, [[data[ids]] for ids in seen], terms,
        rates=lambda t: [LR * factor(t, steps)] * 2, clip=CLIP,
    )  # fmt: skip
    everything = [removal for kind in left_out.values() for removal in kind]
    effects = leave_out(run, everything, queries(), loss_fn, chunk=40)
    truths = dict(zip(left_out, effects.split(REMOVALS, 1), strict=True))
    table = []

    def judge(scores: Tensor, **what: Any) -> None:
        for kind, removals in left_out.items():
            own = torch.stack([scores[:, t * BATCH + row] for ((t, row),) in removals], 1)
            table.append({"removal": kind, **what, "spearman": spearman(own, truths[kind])})

    for kind, rank in (("pca", 16), ("random", 16)):
        method = assay.DataValueEmbedding(
            assay.Projection(rank=rank, kind=kind), axes=axes_of(kind), curvature="ggn", draws=4, logits="head",
            dtype="fp32",
        )  # fmt: skip
        trained, ledger = train(steps, [method])
        forms: list[Method] = [("fisher", "layer", True), ("ggn", "layer", True)]
        forms += (
            [("ggn", "layer", False), ("fisher", "all", True), ("ggn", "all", True)] if kind == "pca" else []
        )
        for curvature, blocks, momentum in forms:
            found = ledger.embeddings(2, curvature, blocks=blocks, momentum=momentum)  # type: ignore[arg-type]
            scores = found.influence(trained, queries(), loss_fn)
            what = {
                "projection": f"{kind} {rank}",
                "curvature": curvature,
                "blocks": blocks,
                "momentum": momentum,
            }
            judge(scores, method="embedding", **what)
        if kind == "pca":
            recorded = Recorded(ledger._source.gradients)
            own = recorded.read(0, recorded.length)[:, 0]
            judge(found.project(trained, queries(), loss_fn) @ own.t(), method="dot product")
    index = assay.Index.build(
        trained, [(list(range(ROWS)), data)], loss_fn, projection=assay.Projection(rank=32)
    )
    scores = index.influence(trained, queries(), loss_fn)
    judge(scores[:, [i for ids in seen for i in ids]], method="influence function")
    return table


def late_target() -> list[dict[str, Any]]:
    """`value_for` beside the values of the same target computed while training."""
    target = assay.Target([torch.cat(queries()[:8])], loss_fn)
    table = []
    for kind, rank, path in (("pca", 16, "left"), ("random", 16, "left"), ("random", 32, "left")):
        method = assay.DataValueEmbedding(assay.Projection(rank=rank, kind=kind), axes=axes_of(kind))
        methods = [assay.InRunShapley({"known": target}, path=path), method]
        model, ledger = train(ROWS // BATCH * EPOCHS, methods, snapshots="auto")
        found, online = ledger.value_for(target, model, path), ledger.steps("known")  # type: ignore[arg-type]
        summed = [f.group_by("id").agg(pl.col("value").sum()).sort("id") for f in (found, online)]
        by_id = spearman(*(torch.tensor(f["value"].to_list()) for f in summed))
        by_row = spearman(*(torch.tensor(f["value"].to_list()) for f in (found, online)))
        table.append({"projection": f"{kind} {rank}", "path": path, "by_id": by_id, "by_row": by_row})
    return table


def stages() -> list[dict[str, float]]:
    """The influence-by-step curve of a longer run, smoothed over 8 steps."""
    method = assay.DataValueEmbedding(
        assay.Projection(rank=16, kind="pca"), axes=axes_of("pca"), curvature="ggn", draws=2, logits="head"
    )
    model, ledger = train(LONG, [method])
    found = ledger.embeddings(segments=4, curvature="ggn")
    curve = found.by_step(found.influence(model, queries(), loss_fn))
    smooth = curve.with_columns(pl.col("influence", "magnitude", "per_lr").rolling_mean(8, min_samples=1))
    return smooth.gather_every(4).to_dicts()


if __name__ == "__main__":
    run_parts_as_command(
        "embeddings_gpt",
        "embeddings.gpt",
        {"values": late_target, "stages": stages, "fidelity": fidelity},
        {
            "model": "GPT of 2 layers, width 32, over bytes, context 32, about 30,000 parameters",
            "training": f"AdamW 0.9/0.95, decay 0.1, learning rate {LR}, clipping {CLIP}, warm-up and cosine, "
            f"{ROWS} rows of three domains, {EPOCHS} epochs, batches of {BATCH}",
            "long": LONG,
            "removals": REMOVALS,
            "queries": QUERIES,
            "seed": SEED,
        },
    )
