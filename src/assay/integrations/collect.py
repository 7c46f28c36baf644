"""Ids and metadata of a batch, taken from the examples before a data collator throws them away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from torch import Tensor

from assay.errors import InputError
from assay.integrations.identity import content_id

__all__ = ["KEY", "Collector", "Notes", "Taken"]

KEY = "_assay"
"""Under this key a batch carries what was taken from its examples, as far as the training step."""


@dataclass(frozen=True)
class Taken:
    """What is known of one batch.

    Attributes:
        ids: one id per row of the batch.
        rows: metadata, one mapping with `id` per row; empty where no columns were asked for.
        packed: `(id of the row, id of a document in it, tokens)` where rows hold several documents.
    """

    ids: list[int | str]
    rows: list[dict[str, Any]]
    packed: list[tuple[int | str, str, int]]


@dataclass(frozen=True)
class Collector:
    """A data collator that hands on what the user's one makes, and the examples' ids beside it.

    Args:
        collate: the user's data collator: a list of examples to a mapping of tensors.
        id: the column that names an example; None for a hash of the columns that the collator gets.
        columns: further columns to keep as metadata.
        keep: the columns that the collator gets and that are hashed; None for all.
    """

    collate: Callable[[list[Any]], Any]
    id: str | None = None
    columns: Sequence[str] = ()
    keep: frozenset[str] | None = None

    def __call__(self, examples: list[Any]) -> Any:
        """Collate; the batch carries `Taken` under `KEY`."""
        if not isinstance(examples[0], Mapping):
            raise InputError(
                f"an example of the training data is a {type(examples[0]).__name__}, not a mapping of columns: "
                "assay takes ids and content by the columns' names; hand over dicts"
            )
        plain = [{key: value for key, value in example.items() if self._stays(key)} for example in examples]
        ids = [self._name(example, bare) for example, bare in zip(examples, plain, strict=True)]
        rows = [
            {"id": id_, **{column: _plain(example.get(column)) for column in self.columns}}
            for id_, example in zip(ids, examples, strict=True)
            if self.columns
        ]
        packed = [part for id_, bare in zip(ids, plain, strict=True) for part in _documents(id_, bare)]
        batch = self.collate(plain)
        height = _height(batch)
        if (
            height == 1 and len(ids) > 1
        ):  # a padding-free collator makes one row of all: that row is the sample
            whole = content_id(ids)
            inside = packed or [(id_, str(id_), _length(bare)) for id_, bare in zip(ids, plain, strict=True)]
            packed = [(whole, document, tokens) for _, document, tokens in inside]
            ids, rows = [whole], []
        batch[KEY] = Taken(ids, rows, packed)
        return batch

    def _stays(self, key: str) -> bool:
        return self.keep is None or key in self.keep

    def _name(self, example: Mapping[str, Any], bare: Mapping[str, Any]) -> int | str:
        if self.id is None:
            return content_id(bare)
        if self.id not in example:
            raise InputError(
                f"the training data has no column {self.id!r}, only {', '.join(map(repr, example))}: name one by "
                "id=, or leave id= out to name examples by a hash of their content"
            )
        id_ = _plain(example[self.id])
        if isinstance(id_, bool) or not isinstance(id_, int | str):
            raise InputError(
                f"id {id_!r} in column {self.id!r} is neither a whole number nor a string: cast it"
            )
        return id_


class Notes:
    """Metadata of the samples that were seen, handed to a run in bulk."""

    def __init__(self, group: str | None = None) -> None:
        self.group = group
        self.groups: dict[Any, str] = {}
        self._seen: set[Any] = set()
        self._rows: list[dict[str, Any]] = []
        self._packed: dict[Any, list[tuple[int | str, str, int]]] = {}

    def add(self, taken: Taken) -> None:
        """Remember the rows of a batch that are new."""
        for row in taken.rows:
            if row["id"] not in self._seen:
                self._seen.add(row["id"])
                self._rows.append(row)
                if self.group is not None:
                    self.groups[row["id"]] = str(row[self.group])
        for part in taken.packed:
            self._packed.setdefault(part[0], [])
        for id_ in {part[0] for part in taken.packed}:
            self._packed[id_] = [part for part in taken.packed if part[0] == id_]

    def hand_over(self, writer: Any) -> None:
        """Write what is new: metadata, and the table `packed` (id, document, tokens)."""
        if self._rows:
            writer.add_metadata(pl.DataFrame(self._rows, infer_schema_length=None, strict=False))
            self._rows = []
        if self._packed:
            parts = [part for of_row in self._packed.values() for part in of_row]
            writer.add_table("packed", pl.DataFrame(parts, schema=["id", "document", "tokens"], orient="row"))


def _documents(id_: int | str, example: Mapping[str, Any]) -> list[tuple[int | str, str, int]]:
    """The documents of a packed row, each named by the hash of its tokens."""
    lengths, tokens = example.get("seq_lengths"), example.get("input_ids")
    if lengths is None or tokens is None:
        return []
    parts, start = [], 0
    for length in map(int, lengths):
        parts.append((id_, content_id(tokens[start : start + length]), length))
        start += length
    return parts


def _length(example: Mapping[str, Any]) -> int:
    tokens = example.get("input_ids")
    return 0 if tokens is None else len(tokens)


def _height(batch: Any) -> int | None:
    """Rows of the first tensor of a batch."""
    return next((len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim()), None)


def _plain(value: Any) -> Any:
    """A number or string of Python in place of a tensor's or array's one."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value
