"""What it costs in accuracy that a projection reads a part of its sides: `Projection(support=...)`.

The perceptron on digits against honest retraining, and a wider GPT: values for a late target beside those computed in
the run, and influence beside retraining. Each projection with several seeds of its random numbers.
"""

from __future__ import annotations

from functools import cache, partial
from statistics import mean, stdev
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

import assay
from assay.demo.gpt import GPT, GPTConfig
from assay.evaluate import Removal, Training, leave_out
from experiments.command import run_parts_as_command
from experiments.embeddings import gpt as text
from experiments.embeddings import mnist
from experiments.embeddings.common import spearman
from experiments.paths.common import CONTEXT, adamw, loss_fn, mixture
from experiments.truth.mnist import digits
from experiments.truth.mnist import loss_fn as digits_loss

TIMES = (None, 8, 4, 2)  # the support over the rank; None reads everything
SEEDS = range(3)
WIDTH, STEPS, REMOVALS = 128, text.ROWS // text.BATCH, 40
FORMS = (("fisher", "layer"), ("ggn", "layer"))


def projections(kind: str, rank: int, widest: int) -> list[tuple[int | None, list[assay.Projection]]]:
    """By support over the rank: one projection per seed; without anything random in it, one."""
    found = []
    for times in TIMES:
        support = None if times is None else times * rank
        if support is None or support < widest:
            seeds = SEEDS if kind == "random" or support is not None else SEEDS[:1]
            found.append((times, [assay.Projection(rank, kind, seed, support) for seed in seeds]))  # type: ignore[arg-type]
    return found


def summary(found: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    return {
        "spearman": mean(found),
        "deviation": stdev(found) if len(found) > 1 else None,
        "seeds": len(found),
    }


# --- digits ---


def on_digits(name: str, lr: float) -> list[dict[str, Any]]:
    """Spearman against retraining, by projection, form and removal."""
    data = digits(mnist.SEED, queries=mnist.QUERIES)
    truth = mnist.truth(name, lr, data, mnist.removals(data))
    table = []
    for kind, rank in (("random", 16), ("pca", 16), ("random", 64)):
        for times, choices in projections(kind, rank, 784):
            scores: dict[tuple[str, str, str], list[float]] = {}
            for projection in choices:
                judge = mnist.Judge(data, truth, {})
                model, ledger = mnist.record(name, lr, data, projection)
                for curvature, blocks in FORMS:
                    found = ledger.embeddings(2, curvature, blocks=blocks, momentum=name == "AdamW")  # type: ignore[arg-type]
                    judge.take(
                        "embedding",
                        found.influence(model, data.queries, digits_loss),
                        curvature=curvature,
                        blocks=blocks,
                    )
                for row in judge.table:
                    key = row["curvature"], row["blocks"], row["removal"]
                    scores.setdefault(key, []).append(row["spearman"])
            what = {"projection": kind, "rank": rank, "times": times}
            for (curvature, blocks, removal), own in scores.items():
                table.append(
                    {**what, "curvature": curvature, "blocks": blocks, "removal": removal, **summary(own)}
                )
    return table


# --- text ---


def gpt(dtype: torch.dtype = torch.float32) -> nn.Module:
    """About 420,000 parameters: 2 layers of width 128 over bytes."""
    torch.manual_seed(text.SEED)
    return GPT(GPTConfig(vocabulary=128, context=CONTEXT, layers=2, heads=4, width=WIDTH)).to(dtype)


def trained(methods: list[Any]) -> tuple[nn.Module, assay.Ledger]:
    """A run with its records."""
    data, model = mixture(text.DOMAINS, text.ROWS, text.SEED), gpt()
    optimizer = adamw(model, text.LR)
    with assay.Run(model, optimizer, methods=methods, snapshots="auto", check="off") as run:
        for t, ids in enumerate(text.order(STEPS)):
            for group in optimizer.param_groups:
                group["lr"] = text.LR * text.factor(t, STEPS)
            with run.step(ids):
                loss_fn(model, data[ids]).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), text.CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return model, run.ledger


def removals() -> list[Removal]:
    """One row's term in one step each."""
    generator = torch.Generator().manual_seed(1)
    places = [(t, row) for t in range(STEPS) for row in range(text.BATCH)]
    return [[places[n]] for n in torch.randperm(len(places), generator=generator)[:REMOVALS].tolist()]


@cache
def effects() -> Tensor:
    """`[Q, removals]`: by retraining in float64."""
    data, model = mixture(text.DOMAINS, text.ROWS, text.SEED), gpt(torch.float64)
    optimizer = adamw(model, text.LR)
    rates = lambda t: [text.LR * text.factor(t, STEPS)] * 2  # noqa: E731
    batches = [[data[ids]] for ids in text.order(STEPS)]
    run = Training(model, optimizer, batches, text.terms, rates=rates, clip=text.CLIP)
    return leave_out(run, removals(), text.queries(), loss_fn, chunk=10)


def on_text(kind: str, rank: int) -> list[dict[str, Any]]:
    """Spearman of `value_for` with the values of the run, and of the influence with retraining."""
    target = assay.Target([torch.cat(text.queries()[:8])], loss_fn)
    axes = text.axes_of(kind)
    places = [t * text.BATCH + row for ((t, row),) in removals()]
    table = []
    for times, choices in projections(kind, rank, 4 * WIDTH):
        scores: dict[str, list[float]] = {"value_for": [], "retraining": []}
        for projection in choices:
            method = assay.DataValueEmbedding(
                projection, axes=axes, curvature="ggn", draws=2, logits="head", dtype="fp32"
            )
            model, ledger = trained([assay.InRunShapley({"known": target}), method])
            both = (ledger.value_for(target, model, "left"), ledger.steps("known"))
            summed = [f.group_by("id").agg(pl.col("value").sum()).sort("id") for f in both]
            scores["value_for"].append(spearman(*(torch.tensor(f["value"].to_list()) for f in summed)))
            influence = ledger.embeddings(2, "ggn").influence(model, text.queries(), loss_fn)
            scores["retraining"].append(spearman(influence[:, places], effects()))
        what = {"projection": kind, "rank": rank, "times": times}
        table += [{**what, "against": against, **summary(own)} for against, own in scores.items()]
    return table


if __name__ == "__main__":
    run_parts_as_command(
        "embeddings_support",
        "embeddings.support",
        {f"GPT {kind} 16": partial(on_text, kind, 16) for kind in ("random", "pca")}
        | {f"digits {name} {lr:g}": partial(on_digits, name, lr) for name, lr in reversed(mnist.ANCHORS)}
        | {f"GPT {kind} 64": partial(on_text, kind, 64) for kind in ("random", "pca")},
        {
            "gpt": f"GPT of 2 layers, width {WIDTH}, over bytes, context {CONTEXT}; AdamW, {STEPS} steps of "
            f"{text.BATCH} rows, learning rate {text.LR}, clipping {text.CLIP}, warm-up and cosine",
            "digits": "784-48-10 tanh network, 1,000 images, 4 epochs, batches of 32",
            "removals": REMOVALS,
            "seeds": len(SEEDS),
        },
    )
