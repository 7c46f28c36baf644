"""The user's own sample ids: whole numbers or strings, one kind in a run."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl

from assay.errors import InputError

IdKind = Literal["int", "str"]

DTYPES: dict[IdKind, pl.DataType] = {"int": pl.Int64(), "str": pl.String()}
_NAMES: dict[IdKind, str] = {"int": "whole numbers", "str": "strings"}


def id_series(ids: Any, kind: IdKind | None) -> pl.Series:
    """Copy the ids of a batch into a series named "id", of the kind that the run already has.

    Args:
        ids: Python or NumPy integers (below 2**63) or strings: a sequence, an array or a tensor, shape
            [samples].
        kind: The run's kind, or None while it has none.

    Returns:
        Series of length samples, Int64 or String.

    Raises:
        InputError: Booleans, fractions, mixtures, missing values, a wrong shape or the other kind.

    Example:
        >>> id_series([3, 1], None).to_list()
        [3, 1]
        >>> id_series(["a"], "int")
        Traceback (most recent call last):
            ...
        assay.errors.InputError: this run's ids are whole numbers, but 'a' is not: keep to one kind in a run
    """
    items = _items(ids)
    if not items:
        return pl.Series("id", [], dtype=DTYPES[kind or "int"])
    found = _kind_of_items(items)
    _check_kind(found, kind, items[0])
    try:
        return pl.Series("id", items, dtype=DTYPES[found])
    except (OverflowError, UnicodeEncodeError, TypeError) as error:
        raise InputError("an id cannot be stored: use integers of 64 bits, or valid text") from error


def id_column(column: pl.Series, kind: IdKind | None) -> pl.Series:
    """Cast a whole column of ids, as in a metadata table, to the stored type of the run's kind.

    Raises:
        InputError: A missing id, a column that holds neither integers nor strings, or the other kind.
    """
    if column.null_count():
        at = int(column.is_null().arg_true()[0])
        raise InputError(f"the metadata column 'id' has no id in row {at}: give every row one")
    found = kind_of_dtype(column.dtype)
    if found is None:
        raise InputError(
            f"the metadata column 'id' has type {column.dtype}: ids are whole numbers or strings"
        )
    if len(column):
        _check_kind(found, kind, column[0])
    try:
        cast: pl.Series = column.cast(DTYPES[found])
    except pl.exceptions.PolarsError as error:
        raise InputError("an id of the metadata cannot be stored: use integers of 64 bits") from error
    return cast


def kind_of_dtype(dtype: pl.DataType) -> IdKind | None:
    """Kind of ids that a column of this type holds; None if it can hold none."""
    if dtype.is_integer():
        return "int"
    return "str" if isinstance(dtype, pl.String | pl.Categorical | pl.Enum) else None


def _check_kind(found: IdKind, kind: IdKind | None, example: object) -> None:
    if kind is not None and found != kind:
        raise InputError(
            f"this run's ids are {_NAMES[kind]}, but {example!r} is not: keep to one kind in a run"
        )


def _items(ids: Any) -> list[Any]:
    """Ids as a flat list of new Python objects."""
    if isinstance(ids, str | bytes):
        raise InputError(f"ids must be a sequence with one id per sample, not the single {ids!r}")
    if isinstance(ids, list | tuple):
        return list(ids)
    try:
        array = np.asarray(ids)
    except Exception as error:  # a tensor on an accelerator, say
        raise InputError(
            f"ids of type {type(ids).__name__} cannot be read: hand over a list of them"
        ) from error
    if array.ndim != 1:
        raise InputError(f"ids of shape {list(array.shape)}: hand over a flat sequence, one id per sample")
    return list(array.tolist())


def _kind_of_items(items: list[Any]) -> IdKind:
    """Kind of a non-empty list of ids; scalars of other libraries in it become Python's own."""
    types = {type(item) for item in items}
    if types not in ({int}, {str}):
        items[:] = [_plain(item) for item in items]
        types = {type(item) for item in items}
    if types == {int}:
        return "int"
    if types == {str}:
        return "str"
    wanted = type(items[0])
    at = next((i for i, item in enumerate(items) if type(item) not in (int, str) or type(item) is not wanted))
    raise InputError(
        f"position {at} of the ids holds {items[at]!r} ({type(items[at]).__name__}): "
        "ids are whole numbers or strings, all of one kind"
    )


def _plain(item: Any) -> Any:
    """Python's own int or str for a scalar of another library that means one; else the item itself."""
    if isinstance(item, str):
        return str(item)
    if isinstance(item, bool) or not (isinstance(item, int) or hasattr(item, "__array__")):
        return item
    array = np.asarray(item)
    return int(array) if array.ndim == 0 and array.dtype.kind in "iu" else item
