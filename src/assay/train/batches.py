"""Rows of tokens and the padded batches that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from assay.demo import IGNORED

__all__ = ["Batch", "Id", "Row", "batch_rows", "make_batch", "make_rows"]

Id = int | str


@dataclass(frozen=True)
class Row:
    """One row of a batch: a document, or the part of it that fits into the context.

    Attributes:
        id: the document's.
        tokens: ``T + 1`` token ids; each but the last is an input, each but the first a target.
    """

    id: Id
    tokens: list[int]


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    Attributes:
        tokens: inputs, ``[B, T]``.
        targets: the token after each input, ``[B, T]``; ``IGNORED`` where the row has ended.
    """

    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.targets.to(device))


def make_rows(
    ids: Iterable[Id], sequences: Iterable[list[int]], context: int, long: Literal["split", "cut"]
) -> list[Row]:
    """Cut token sequences into rows of at most ``context`` inputs.

    Args:
        ids: one id per document.
        sequences: the tokens of each document, with whatever marks its start and end.
        context: most inputs of a row.
        long: ``split`` makes several rows with the same id out of a longer document, each starting where the
            last one ended; ``cut`` keeps its first row.

    Example:
        >>> make_rows(["a"], [[1, 2, 3, 4]], context=2, long="split")
        [Row(id='a', tokens=[1, 2, 3]), Row(id='a', tokens=[3, 4])]
    """
    rows: list[Row] = []
    for id_, tokens in zip(ids, sequences, strict=True):
        starts = range(0, len(tokens) - 1, context) if long == "split" else (0,)
        rows += [Row(id_, tokens[start : start + context + 1]) for start in starts]
    return rows


def make_batch(rows: Sequence[Row]) -> Batch:
    """Pad rows at their end to the longest of them.

    Example:
        >>> make_batch([Row("a", [1, 2, 3]), Row("b", [4, 5])]).targets
        tensor([[   2,    3],
                [   5, -100]])
    """
    longest = max(len(row.tokens) for row in rows) - 1
    tokens = torch.zeros(
        len(rows), longest, dtype=torch.long
    )  # [B, T]; what pads an input is never looked at
    targets = torch.full_like(tokens, IGNORED)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens) - 1] = torch.tensor(row.tokens[:-1])
        targets[i, : len(row.tokens) - 1] = torch.tensor(row.tokens[1:])
    return Batch(tokens, targets)


def batch_rows(
    rows: Sequence[Row], batch_size: int, generator: torch.Generator, pool: int = 8
) -> Iterator[list[Row]]:
    """One pass over all rows, shuffled.

    Rows of like length go together, because padding costs as much as text: within each ``pool`` of shuffled
    batches the rows are sorted by length, and the batches are shuffled again.

    Args:
        rows: everything to train on.
        batch_size: rows of a batch; the last batch may be smaller.
        generator: of the order.
        pool: how many batches are sorted together.
    """
    order = torch.randperm(len(rows), generator=generator).tolist()
    batches: list[list[Row]] = []
    for start in range(0, len(order), pool * batch_size):
        near = sorted(order[start : start + pool * batch_size], key=lambda i: len(rows[i].tokens))
        batches += [[rows[i] for i in near[at : at + batch_size]] for at in range(0, len(near), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]
