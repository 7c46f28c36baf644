"""The methods of assay itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from assay.evaluate.task import Task
from assay.index import Index
from assay.index.curvature import Curvature
from assay.methods import DataValueEmbedding, InRunShapley
from assay.projection import Projection
from assay.store import Ledger
from assay.targets import Target

__all__ = ["Adjoint", "Embeddings", "InRun", "Influence", "SelfInfluence"]

RANK, DAMPING = 16, 0.1  # by default; others stand in a method's name


def by_example(ledger: Ledger, values: Tensor, examples: int) -> Tensor:
    """`[questions, examples]`: values of all steps, `[questions, rows]`, summed by example."""
    place = torch.tensor(ledger.rows["id"].to_list())
    return torch.zeros(len(values), examples, dtype=torch.float64).index_add(1, place, values.double().cpu())


@dataclass(frozen=True)
class InRun:
    """In-Run Data Shapley values; the training is watched.

    Args:
        path: of the integral.
        momentum: what becomes of the part that momentum carries.
        even: all steps weigh alike; see `Ledger.values`.
    """

    path: str = "left"
    momentum: str = "instant"
    even: bool = False

    @property
    def name(self) -> str:
        """With its settings."""
        words = [f"in-run, {self.path}"]
        words += [] if self.momentum == "instant" else [f"momentum {self.momentum}"]
        return ", ".join([*words, *(["every step alike"] if self.even else [])])

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`, in the loss's unit."""
        targets = task.targets()
        method = InRunShapley(targets, self.path, self.momentum, band=(0.0, 1e9))
        ledger = task.loop.train([method]).recorded
        found = torch.zeros(len(targets), task.examples, dtype=torch.float64)
        for row, target in zip(found, targets, strict=True):
            values = ledger.values(target, even=self.even)
            row[torch.tensor(values["id"].to_list())] = torch.tensor(values["value"].to_list()).double()
        return found


@dataclass(frozen=True)
class Embeddings:
    """Data value embeddings: what if the example had been left out of the steps that it was in?

    Args:
        curvature: "fisher" as published, or "ggn".
        rank: of the projection to principal axes.
        blocks: "layer" as published, or "all".
    """

    curvature: Literal["fisher", "ggn"] = "fisher"
    rank: int = RANK
    blocks: Literal["layer", "all"] = "layer"

    @property
    def name(self) -> str:
        """With its settings; a rank and blocks other than by default are named."""
        words = [f"embeddings, {self.curvature}"]
        words += [] if self.rank == RANK else [f"rank {self.rank}"]
        return ", ".join([*words, *([] if self.blocks == "layer" else [f"blocks {self.blocks}"])])

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`, in the loss's unit."""
        axes = Target([batch for _, batch in task.batches()], task.loss_fn)
        single = task.labels is not None  # one prediction per row, whose Gauss-Newton matrix has few columns
        method = DataValueEmbedding(
            Projection(rank=self.rank, kind="pca"), axes=axes, curvature=self.curvature, dtype="fp32",
            draws="all" if single and self.curvature == "ggn" else 1, logits=task.outputs,
        )  # fmt: skip
        watched = task.loop.train([method])
        embeddings = watched.recorded.embeddings(curvature=self.curvature, blocks=self.blocks)
        found = embeddings.influence(watched.model, [task.queries], task.loss_fn)
        return by_example(watched.recorded, task.merged(found), task.examples)


@dataclass(frozen=True)
class Influence:
    """Influence functions on the finished model, of projected gradients.

    Args:
        kind: "logra" (random projections), "logra-pca", "kfac" or "ekfac" (both without projection).
        rank: of the projections.
        damping: in mean eigenvalues of each layer.
        normalize: as in `Index.influence`.
    """

    kind: Literal["logra", "logra-pca", "kfac", "ekfac"] = "logra"
    rank: int = RANK
    damping: float = DAMPING
    normalize: Literal["relatif", "unit"] | None = None

    @property
    def name(self) -> str:
        """As the papers call it; a rank and a damping other than by default are named."""
        kind = {"logra": "LoGra", "logra-pca": "LoGra, PCA", "kfac": "KFAC", "ekfac": "EKFAC"}[self.kind]
        words = [kind, *([self.normalize] if self.normalize else [])]
        words += [] if self.rank == RANK or self.kind in ("kfac", "ekfac") else [f"rank {self.rank}"]
        return ", ".join([*words, *([] if self.damping == DAMPING else [f"damping {self.damping:g}"])])

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`; over N, in the loss's unit."""
        model = task.trained.model
        whole = self.kind in ("kfac", "ekfac")
        projection = Projection(
            rank=None if whole else self.rank, kind="random" if self.kind == "logra" else "pca"
        )
        curvature: Curvature = self.kind if whole else "fisher"  # type: ignore[assignment]
        index = Index.build(model, task.batches(), task.loss_fn, projection=projection, dtype="fp32")
        found = index.influence(model, [task.queries], task.loss_fn, self.damping, self.normalize, curvature)
        return task.merged(found)


@dataclass(frozen=True)
class SelfInfluence:
    """Minus the influence of an example on itself: what only it could teach the model is held to be a mistake.

    Args:
        rank: of the random projections.
        damping: in mean eigenvalues of each layer.

    Source: Koh and Liang, Understanding Black-box Predictions via Influence Functions, ICML 2017, arXiv 1703.04730,
    section 5.4.
    """

    rank: int = RANK
    damping: float = DAMPING
    name: str = "low self-influence"

    def scores(self, task: Task) -> Tensor:
        """`[1, N]`."""
        index = Index.build(
            task.trained.model,
            task.batches(),
            task.loss_fn,
            projection=Projection(rank=self.rank),
            dtype="fp32",
        )
        return -index.self_influence(self.damping)["self_influence"].to_torch()[None]


@dataclass(frozen=True)
class Adjoint:
    """The exact answer to first order, by replaying the training backwards.

    Args:
        curvature: "hessian", or "ggn".
    """

    curvature: Literal["hessian", "ggn"] = "hessian"

    @property
    def name(self) -> str:
        """With its settings."""
        return f"adjoint, {self.curvature}"

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`, in the loss's unit."""
        watched = task.loop.train(snapshots="auto")
        found = watched.recorded.adjoint(
            watched.model, watched.optimizer, watched.batches_of_step, watched.loss_fn, task.question_batches(),
            query_loss=task.loss_fn, curvature=self.curvature,
            outputs=task.outputs if self.curvature == "ggn" else None,
        )  # fmt: skip
        return by_example(watched.recorded, found, task.examples)
