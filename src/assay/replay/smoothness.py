"""Is the outcome of this training smooth enough in the weights of its data for a derivative to mean something?

The run is trained again with every micro-batch's loss weighted by 1 + h v, v = ±1 at random, for h and for 2h. With Δ
and Δ' the changes of the final weights over the first and over the second h, the *metasmoothness* is

    Σ_j |Δ_j| sign(Δ_j) sign(Δ'_j) / Σ_j |Δ_j|

1 where every weight goes on as it began, 0 where the second change has nothing to do with the first. Where it is low no
first-order answer can be right, the exact adjoint's included.

Source: Engstrom et al., Optimizing ML Training with Metagradient Descent, 2025, arXiv 2503.13751, definition 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from assay.errors import InputError
from assay.replay.backward import Queries, clipping_of, targets_of
from assay.replay.forward import Batches, Forward, Loss
from assay.replay.optimizers import adjoint_of
from assay.replay.trajectory import Trajectory
from assay.store.tensors import TensorFiles
from assay.targets import TargetPass

__all__ = ["Smoothness", "metasmoothness"]

SMOOTH = 0.7
BENT = 0.5  # median over the queries of |ratio − 1|


@dataclass(frozen=True)
class Smoothness:
    """How smooth a training run is in the weights of its data.

    Args:
        score: the metasmoothness, −1 to 1.
        ratios: `[queries]`: the second change of each query's loss over the first; 1 where it is linear.
        advice: what to do about it; empty where the run is smooth.
    """

    score: float
    ratios: Tensor
    advice: str


def metasmoothness(
    files: TensorFiles | None,
    model: Module,
    optimizer: Optimizer,
    batches_of_step: Batches,
    loss_fn: Loss,
    queries: Queries,
    h: float = 0.01,
    seed: int = 0,
) -> Smoothness:
    """Train the run again three times; see `Ledger.metasmoothness`."""
    if not h > 0:
        raise InputError(f"metasmoothness(h={h!r}) must be above 0, such as 0.01.")
    trajectory = Trajectory(files)
    forward = Forward(
        model,
        optimizer,
        trajectory,
        batches_of_step,
        loss_fn,
        clipping_of(trajectory, model),
        adjoint_of(optimizer),
    )
    with forward.borrowed():
        passes = TargetPass(model, targets_of(queries, loss_fn), forward.flat.params)
        ends, losses = [], []
        for moved in (0.0, h, 2 * h):
            _train(forward, moved, seed)
            ends.append(forward.flat.weights())
            losses.append(passes.losses())
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    score = float((first.abs() * first.sign() * second.sign()).sum() / first.abs().sum().clamp_min(1e-300))
    ratios = (losses[2] - losses[1]) / (losses[1] - losses[0])
    bent = float((ratios - 1).abs().median())
    smooth = score >= SMOOTH and bent <= BENT
    return Smoothness(score, ratios.cpu(), "" if smooth else _advice(score, bent))


def _train(forward: Forward, moved: float, seed: int) -> None:
    """All steps from the first snapshot, each micro-batch's loss weighted."""
    trajectory = forward.trajectory
    forward.restore(trajectory.start)
    forward.check.begin(trajectory.start)
    if moved == 0:  # learns from the first step how micro-batches add up
        first = next(r for _, r in sorted(trajectory.records.items()) if not r.skipped)
        forward.step(first, keep=False)
        forward.restore(trajectory.start)
    generator = torch.Generator().manual_seed(seed)
    for t in range(trajectory.start, trajectory.end):
        record = trajectory.records[t]
        signs = 2 * torch.randint(2, (len(record.ids),), generator=generator) - 1
        if not record.skipped:
            forward.step(record, keep=False, factors=(1 + moved * signs).tolist())


def _advice(score: float, bent: float) -> str:
    return (
        f"metasmoothness {score:.2f}, the queries' losses off a straight line by {bent:.0%}: the outcome of this "
        "training is not smooth in the weights of its data, so that no first-order value means much, exact or not. "
        "What helps: a lower peak learning rate or a longer warm-up, a larger eps in Adam, clipping, normalisation "
        "before the nonlinearities, a wider network; or ask for the last steps only, adjoint(last=...)."
    )
