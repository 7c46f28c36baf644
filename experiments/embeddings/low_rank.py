"""Whether a low-rank M pays: time and fidelity of Algorithm 1 with M = U Vᵀ, beside the whole matrix, by block size."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import assay
from assay.embedding.header import SCALARS
from assay.embedding.recorded import Recorded
from experiments.command import run_as_command
from experiments.embeddings.common import spearman
from experiments.embeddings.gpt import BATCH, EPOCHS, ROWS, axes_of, queries, train
from experiments.paths.common import loss_fn

Step = tuple[Tensor, Tensor]  # K g `[n, w]`, and the rows x = g/a `[n, w]` of the empirical Fisher matrix


def steps_of(recorded: Recorded) -> list[Step]:
    """Of the run, in the order of time."""
    found, entries = [], recorded.header.entries()
    speed, scale = (SCALARS.index(name) for name in ("speed", "scale"))
    for step in recorded.steps:
        g, Dg = recorded.read(step.start, step.stop).unbind(1)
        K = (step.scalars[:, speed] * step.scalars[:, scale])[entries].to(Dg.dtype)
        found.append((Dg * K, g / recorded.weights[step.start : step.stop, None].to(g.dtype)))
    return found


def whole(steps: list[Step]) -> Tensor:
    """`[rows, w]`: E with M written out."""
    M, found = torch.zeros(steps[0][0].shape[1], steps[0][0].shape[1]), []
    for Kg, x in reversed(steps):
        E = Kg - Kg @ M.t()
        M.addmm_(E.t(), x)
        found.append(E)
    return torch.cat(found[::-1])


def low_rank(steps: list[Step], rank: int) -> Tensor:
    """`[rows, w]`: E with M = U Vᵀ, cut back to `rank` columns when it has twice as many."""
    width, found = steps[0][0].shape[1], []
    U, V = torch.zeros(width, 0), torch.zeros(width, 0)
    for Kg, x in reversed(steps):
        E = Kg - (Kg @ V) @ U.t()
        U, V = torch.cat([U, E.t()], 1), torch.cat([V, x.t()], 1)
        if U.shape[1] >= 2 * rank:
            (Q, R), (P, S) = torch.linalg.qr(U), torch.linalg.qr(V)
            left, size, right = torch.linalg.svd(R @ S.t())
            U, V = Q @ (left[:, :rank] * size[:rank]), P @ right[:rank].t()
        found.append(E)
    return torch.cat(found[::-1])


def timed(build: Any, *arguments: Any) -> tuple[Tensor, float]:
    """The result, and the processor's seconds: the best of three."""
    taken = []
    for _ in range(3):
        started = time.process_time()
        found = build(*arguments)
        taken.append(time.process_time() - started)
    return found, min(taken)


def experiment() -> dict[str, Any]:
    """Seconds, and the rank correlation of the influence with that of the whole M, by projection and rank of M."""
    table = []
    for rank in (8, 16, 24):
        method = assay.DataValueEmbedding(
            assay.Projection(rank=rank, kind="pca"), axes=axes_of("pca"), dtype="fp32"
        )
        model, ledger = train(ROWS // BATCH * EPOCHS, [method])
        recorded = Recorded(ledger._source.gradients)
        steps = steps_of(recorded)
        projector = ledger.embeddings(blocks="layer")
        asked = projector.project(model, queries(), loss_fn)
        exact, seconds = timed(whole, steps)
        truth, without = asked @ exact.t(), asked @ torch.cat([Kg for Kg, _ in steps]).t()
        table.append({
            "width": recorded.header.width, "rank": None, "seconds": seconds, "spearman": 1.0,
            "without_curvature": spearman(without, truth),
        })  # fmt: skip
        for kept in (32, 128, 512):
            found, seconds = timed(low_rank, steps, kept)
            row = {
                "width": recorded.header.width,
                "rank": kept,
                "seconds": seconds,
                "spearman": spearman(asked @ found.t(), truth),
            }
            table.append(row)
    return {
        "training": f"the small GPT of embeddings_gpt, {ROWS // BATCH * EPOCHS} steps of {BATCH} rows, AdamW, "
        "one block over all layers, empirical Fisher matrix",
        "seed": 0,
        "table": table,
    }


if __name__ == "__main__":
    run_as_command("embeddings_low_rank", "embeddings.low_rank", experiment)
