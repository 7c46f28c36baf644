"""Which words example and query have in common.

Source: Robertson et al., Okapi at TREC-3, 1994; Lù, BM25S, arXiv 2407.03618 (the library `bm25s`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import InputError
from assay.evaluate.baselines.base import require
from assay.evaluate.task import Task

__all__ = ["BM25", "bm25"]


def bm25(examples: Sequence[str], queries: Sequence[str]) -> Tensor:
    """`[Q, N]`: BM25 of every example for every query, in Lucene's form, k₁ 1.5 and b 0.75.

    Example:
        >>> bm25(["a red fox", "the blue sea", "blue sky and sea"], ["sea"])[0].argsort().tolist()
        [0, 2, 1]
    """
    library = require("bm25s")
    index = library.BM25()
    index.index(_words(library, examples), show_progress=False)
    rows = [
        torch.as_tensor(index.get_scores(tokens)) if tokens else torch.zeros(len(examples))
        for tokens in _words(library, queries)
    ]
    return torch.stack(rows).float()


def _words(library: object, texts: Sequence[str]) -> list[list[str]]:
    """The words of each text; common English words count as others do, since BM25 weighs them itself."""
    found: list[list[str]] = library.tokenize(  # type: ignore[attr-defined]
        list(texts), stopwords=None, return_ids=False, show_progress=False
    )
    return found


@dataclass(frozen=True)
class BM25:
    """The weight of the words that example and query share."""

    name: str = "BM25"

    def unavailable(self, task: Task) -> str | None:
        """It needs texts."""
        return "it reads texts, and the task has none" if task.texts is None else None

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`."""
        if task.texts is None:
            raise InputError(f"{self.name} reads texts: give Task(texts=).")
        return task.merged(bm25(*task.texts))
