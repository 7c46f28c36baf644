"""Ids and metadata of a batch, taken from the examples before a data collator throws them away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from torch import Tensor

from assay.errors import InputError
from assay.integrations.identity import content_id
from assay.store import RunWriter

__all__ = ["KEY", "Collector", "Notes", "Taken"]

KEY = "_assay"
"""Under this key a batch carries what was taken from its examples, as far as the training step."""

WAITING = 64 << 20
"""Bytes of metadata that may wait in memory until the run writes."""

NAMES, TOKENS = pl.List(pl.String), pl.List(pl.Int64)


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
        drop: columns that are here for their name alone: the collator does not get them, nor are they hashed.
    """

    collate: Callable[[list[Any]], Any]
    id: str | None = None
    columns: Sequence[str] = ()
    drop: frozenset[str] = frozenset()

    def __call__(self, examples: list[Any]) -> Any:
        """Collate; the batch carries `Taken` under `KEY`."""
        if not isinstance(examples[0], Mapping):
            raise InputError(
                f"an example of the training data is a {type(examples[0]).__name__}, not a mapping of columns: "
                "assay takes ids and content by the columns' names; hand over dicts"
            )
        plain = [
            {key: value for key, value in example.items() if key not in self.drop} for example in examples
        ]
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

    def __getattr__(self, name: str) -> Any:
        """Of the user's collator: some trainers read settings from theirs."""
        if name.startswith("__") or "collate" not in self.__dict__:  # while it is copied or sent to a worker
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.collate, name)

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
    """Metadata of the samples that were seen, handed to a run whenever it writes.

    Args:
        group: the column whose value is kept for each id, in `groups`.
    """

    def __init__(self, group: str | None = None) -> None:
        self.group = group
        self.groups: dict[Any, str] = {}
        self._seen: set[Any] = set()
        self._packed: dict[Any, int] = {}  # id → hash of the documents in it
        self._waiting = _Waiting()
        self._refused: InputError | None = None

    @property
    def full(self) -> bool:
        """Whether what waits should be written now, to keep memory bounded."""
        return self._waiting.size >= WAITING

    def add(self, taken: Taken, step: int = 0) -> None:
        """Remember the rows of a batch that are new.

        Args:
            taken: of the batch.
            step: the optimizer step that it is part of.

        Raises:
            InputError: see `check`.
        """
        self.check()
        for row in taken.rows:
            if row["id"] not in self._seen:
                self._seen.add(row["id"])
                self._waiting.rows.append(row)
                self._waiting.size += _size(row)
                if self.group is not None:
                    self.groups[row["id"]] = str(row[self.group])
        inside: dict[int | str, list[tuple[str, int]]] = {}
        for id_, document, tokens in taken.packed:
            inside.setdefault(id_, []).append((document, tokens))
        for id_, parts in inside.items():
            content = hash(tuple(parts))
            if self._packed.get(id_) != content:
                self._packed[id_] = content
                self._waiting.packed.append((step, id_, parts))
                self._waiting.size += _size(parts)

    def hand_over(self, writer: RunWriter) -> None:
        """Give a run what is new: metadata, and the table `packed`.

        Metadata that cannot be kept are refused by `check`, and not here, in the middle of writing the values.

        Raises:
            StoreError: the disk refuses; nothing is lost.
        """
        waiting, self._waiting = self._waiting, _Waiting()
        try:
            if waiting.packed:
                steps, ids, inside = zip(*waiting.packed, strict=True)
                names, tokens = ([[part[at] for part in parts] for parts in inside] for at in (0, 1))
                lists = {"document": pl.Series(names, dtype=NAMES), "tokens": pl.Series(tokens, dtype=TOKENS)}
                writer.add_rows("packed", ids, {"step": steps, **lists})
            if waiting.rows:
                writer.add_metadata(_frame(waiting.rows), widen=True)
        except InputError as error:
            self._refused = error
        except BaseException:  # what is handed over twice counts once
            self._waiting = waiting
            raise

    def check(self) -> None:
        """Tell of metadata that could not be kept.

        Raises:
            InputError: a column's values have no type in common, or one that cannot be stored.
        """
        error, self._refused = self._refused, None
        if error is not None:
            raise error


@dataclass
class _Waiting:
    """What a run has not been given yet: rows of metadata, `(step, id, documents)` of packed rows, about the bytes."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    packed: list[tuple[int, int | str, list[tuple[str, int]]]] = field(default_factory=list)
    size: int = 0


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a table, each column of the type that all its values have in common."""
    columns = []
    for name in rows[0]:
        try:
            column = [{name: row[name]} for row in rows]
            columns.append(pl.DataFrame(column, infer_schema_length=None, strict=False))
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            kinds = sorted({type(row[name]).__name__ for row in rows})
            raise InputError(
                f"column {name!r} of the training data holds values of types that do not go together "
                f"({', '.join(kinds)}): make them one type, or leave it out of columns="
            ) from error
    return pl.concat(columns, how="horizontal")


def _size(value: Any) -> int:
    """About how many bytes a value takes; of a list, as if all entries were like the first."""
    if isinstance(value, str | bytes):
        return 50 + len(value)
    if isinstance(value, Mapping):
        return 200 + sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return 60 + len(value) * (8 + _size(value[0])) if value else 60
    return 30 + int(getattr(value, "nbytes", 0))


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
