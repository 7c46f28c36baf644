"""Which documents stand behind a text, step by step: data value embeddings of a run that `assay train` made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
from torch import Tensor
from torch.nn import Module

from assay.errors import InputError
from assay.store.files import frame_file, write_frame
from assay.store.schema import TABLES
from assay.train.batches import Batch, make_batch, make_rows
from assay.train.config import Config
from assay.train.model import load_model, token_mean_loss

if TYPE_CHECKING:
    from assay.store import Ledger

__all__ = [
    "CURVE",
    "TextInfluence",
    "influence_of_texts",
    "keep_curves",
    "keep_table",
    "loss_of_pair",
    "pair",
]

CURVE = "influence"
"""The side table of curves: query, step, lr, influence, magnitude, per_lr."""


def pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """A batch as the tuple of its tensors, which is what queries are made of."""
    return batch.tokens, batch.targets


def loss_of_pair(model: Module, batch: Any) -> Tensor:
    """`token_mean_loss` of such a tuple."""
    return token_mean_loss(model, Batch(*batch))


@dataclass(frozen=True)
class TextInfluence:
    """What was found for some texts.

    Attributes:
        documents: `query, id, influence`, the most helpful documents of each text first; summed over all steps.
        curves: `query, step, lr, influence, magnitude, per_lr`.
    """

    documents: pl.DataFrame
    curves: pl.DataFrame


def influence_of_texts(
    ledger: Ledger,
    texts: Mapping[str, str],
    segments: int = 1,
    curvature: Literal["fisher", "ggn"] = "fisher",
    workers: int = 1,
) -> TextInfluence:
    """The influence of every document on the loss of each text, of the model as the run left it.

    Args:
        ledger: of a run of `assay train --embeddings`.
        texts: name → text.
        segments: the run is cut into as many.
        curvature: "fisher", or "ggn" if the run recorded it.
        workers: processes that build the embeddings.

    Raises:
        InputError: the run recorded no gradients, was not made by `assay train`, or a text is empty.
    """
    if ledger.path is None or "config" not in ledger.info:
        raise InputError(
            "influence: this run was not made by `assay train`; use ledger.embeddings(...).influence."
        )
    embeddings = ledger.embeddings(segments, curvature, workers=workers)
    config = Config(**ledger.info["config"])
    model, tokenizer = load_model(config.model, ledger.path / "model")
    documents, curves = [], []
    for name, text in texts.items():
        rows = make_rows([name], tokenizer.encode([text]), config.model.context, "cut")
        if not rows or not text.strip():
            raise InputError(f"influence: the text {name!r} is too short; give at least two tokens.")
        query = [pair(make_batch(rows))]
        scores = embeddings.influence(model, query, loss_of_pair)  # [1, rows]
        found = embeddings.rows.with_columns(influence=pl.Series(scores[0].double().numpy()))
        own = found.group_by("id", maintain_order=True).agg(pl.col("influence").sum())
        documents.append(
            own.sort("influence", descending=True).select(pl.lit(name).alias("query"), "id", "influence")
        )
        curves.append(embeddings.by_step(scores).select(pl.lit(name).alias("query"), pl.all()))
    return TextInfluence(pl.concat(documents), pl.concat(curves))


def keep_curves(ledger: Ledger, curves: pl.DataFrame) -> None:
    """Put the curves where the report finds them, in place of older ones.

    Raises:
        StoreError: the disk refused.
    """
    keep_table(ledger, CURVE, curves)


def keep_table(ledger: Ledger, name: str, frame: pl.DataFrame) -> None:
    """Add a side table to a run that is finished, in place of an older one of that name.

    Raises:
        StoreError: the disk refused.
    """
    assert ledger.path is not None
    folder = ledger.path / TABLES
    there = [file.number for path in folder.iterdir() if (file := frame_file(path)) and file.name == name]
    write_frame(folder, name, max(there, default=-1) + 1, frame)
