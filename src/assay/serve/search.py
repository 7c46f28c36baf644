"""Which training documents stand behind a text: the run's own model, and an index of its documents."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import polars as pl
import torch
from torch import Tensor
from torch.nn import Module

from assay.errors import InputError
from assay.index import Index
from assay.projection import Projection
from assay.store import Ledger

__all__ = ["Searcher", "make_searcher"]

ROWS = 16


class Searcher(Protocol):
    """Ranks the documents of a run by what they did for a text."""

    def search(self, text: str) -> pl.DataFrame:
        """Frame `id, score`, the most helpful first, one row per document."""
        ...


class IndexSearcher:
    """Influence functions over an index of the run's final checkpoint.

    Args:
        index: of the documents.
        model: the checkpoint.
        encode: a text to a batch of one row.
        loss: of the model on a batch.
    """

    def __init__(
        self,
        index: Index,
        model: Module,
        encode: Callable[[str], Mapping[str, Tensor]],
        loss: Callable[[Module, Any], Tensor],
    ) -> None:
        self.index, self.model, self.encode, self.loss = index, model, encode, loss
        self._lock = threading.Lock()  # one search at a time: a capture is no thing for two threads

    def search(self, text: str) -> pl.DataFrame:
        """Frame `id, score`: the influence of each document's rows, added up."""
        if not text.strip():
            raise InputError("there is no text to search for: give one of at least two tokens")
        with self._lock:
            scores = self.index.influence(self.model, [self.encode(text)], self.loss)[0]
        frame = pl.DataFrame({"id": self.index.ids, "score": scores.double().cpu().numpy()})
        sums = frame.group_by("id").agg(pl.col("score").sum())
        return sums.sort("score", "id", descending=[True, False])


def make_searcher(
    ledger: Ledger,
    index: str | Path | None = None,
    build: bool = False,
    rank: int = 8,
    progress: Callable[[int], None] | None = None,
) -> IndexSearcher | None:
    """The searcher of a run of `assay train`; None where there is no index.

    Args:
        ledger: of the run.
        index: folder of the index; `index` within the run's folder by default.
        build: make the index if it is not there.
        rank: of the projection of an index that is built.
        progress: called with the number of rows indexed so far.

    Raises:
        InputError: an index is there or to be built, but not the run's model or data.
        StoreError: the index is damaged.
    """
    if ledger.path is None:
        return None
    folder = Path(index) if index is not None else ledger.path / "index"
    there = folder.is_dir() and any(folder.iterdir())
    if not there and index is not None and not build:
        raise InputError(f"there is no index in {folder}: make it with assay serve RUN --build-index")
    if not there and not build:
        return None
    model, tokenizer, config = _model(ledger)

    def encode(text: str) -> dict[str, Tensor]:
        from assay.train.batches import make_batch, make_rows

        batch = make_batch(make_rows([0], tokenizer.encode([text]), config.model.context, "cut"))
        return {"tokens": batch.tokens, "targets": batch.targets}

    if build and not there:
        _build(ledger, model, tokenizer, config, folder, rank, progress)
    return IndexSearcher(Index.open(folder), model, encode, _sum_loss)


def _sum_loss(model: Module, batch: Any) -> Tensor:
    """Cross-entropy summed over all counted tokens: what a row counts depends on no neighbour."""
    from assay.train.batches import Batch
    from assay.train.model import token_mean_loss

    count = (batch["targets"] >= 0).sum()
    total: Tensor = token_mean_loss(model, Batch(batch["tokens"], batch["targets"])) * count
    return total


def _model(ledger: Ledger) -> tuple[Module, Any, Any]:
    from assay.train import config_of
    from assay.train.model import load_model

    assert ledger.path is not None
    config, _ = config_of(ledger)
    model, tokenizer = load_model(config.model, ledger.path / "model")
    return model.eval(), tokenizer, config


def _build(
    ledger: Ledger,
    model: Module,
    tokenizer: Any,
    config: Any,
    folder: Path,
    rank: int,
    progress: Callable[[int], None] | None,
) -> None:
    from assay.train.batches import make_batch, make_rows

    metadata = ledger.metadata()
    if "text" not in metadata.columns:
        raise InputError(
            "the run kept no texts, so there is nothing to index: train with `assay train`, which keeps them"
        )
    documents = ledger.values(ledger.targets[0]).select("id").join(metadata, on="id", maintain_order="left")
    tokens = tokenizer.encode(documents["text"].to_list())
    rows = make_rows(documents["id"].to_list(), tokens, config.model.context, config.data.long)

    def batches() -> Iterator[tuple[list[Any], dict[str, Tensor]]]:
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            batch = make_batch(part)
            yield [row.id for row in part], {"tokens": batch.tokens, "targets": batch.targets}

    torch.manual_seed(0)
    Index.build(
        model,
        batches(),
        _sum_loss,
        out=folder,
        projection=Projection(rank=rank),
        reduction="sum",
        progress=progress,
    )
