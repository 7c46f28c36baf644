"""Documents from wherever they lie: one frame with the columns ``id``, ``text`` and the user's metadata."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from assay.errors import AssayWarning, InputError
from assay.names import did_you_mean
from assay.train.config import Data, Targets
from assay.train.optional import require

__all__ = ["content_id", "fingerprint", "hold_out", "read_documents", "read_rows"]

RESERVED = ("id", "text", "value", "samples", "negative", "mean")
"""Columns that documents cannot be grouped by: they have a meaning of their own here or in `Ledger.by`."""

MOST_TARGETS = 32
"""A column with more values is no list of targets: each costs a pass at every step."""


def content_id(text: str) -> str:
    """Name a document by its content, so that its name survives shuffling: 16 hexadecimal digits of SHA-256.

    Example:
        >>> content_id("What was it worth?")
        '1831c91d73585329'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_documents(data: Data) -> pl.DataFrame:
    """Read the documents that a configuration names.

    Args:
        data: the section ``data`` of the configuration.

    Returns:
        One row per document: ``id`` (string or integer), every other column that holds plain values, and
        ``text``. Documents without text are left out with a warning; two documents may share an id.

    Raises:
        InputError: nothing is there, it cannot be read, or a column is missing or of the wrong type.
    """
    where = str(data.path or data.dataset)
    frame = _read_path(data.path, data.text) if data.path else _read_dataset(data)
    for column in filter(None, (data.text, data.id)):
        _need(frame, column, where)
    if frame.schema[data.text] != pl.String:
        raise InputError(
            f"{where}: the column {data.text!r} holds {frame.schema[data.text]}, not text: name another in data.text"
        )

    full = frame.filter(pl.col(data.text).str.strip_chars() != "")  # null is not unequal either
    if full.height < frame.height:
        _warn(f"{where}: {frame.height - full.height} documents without text are left out")
    frame = full.head(data.limit) if data.limit else full
    if frame.is_empty():
        raise InputError(f"{where} holds no text: name a source that does")

    identity = _identity(frame, data, where)
    nested = [name for name, kind in frame.schema.items() if kind.is_nested() or kind == pl.Object]
    if nested:
        _warn(f"{where}: the columns {', '.join(nested)} hold no plain values and are left out")
    others = frame.drop([*nested, *filter(None, (data.text, data.id))])
    clash = [name for name in ("id", "text") if name in others.columns]
    others = others.drop(clash)  # the user chose other columns for these two
    return others.select(identity.alias("id"), pl.all(), frame[data.text].alias("text"))


def read_rows(data: Data, likely: str | None = None) -> tuple[pl.DataFrame, pl.Series]:
    """Read every row of the data as it is, all columns, and the ids that the documents have in a run.

    Args:
        data: the section ``data`` of a configuration; ``limit`` is not applied.
        likely: the column of ids where ``data`` names none and this one is there.

    Returns:
        The rows as they lie there, and the id of each, null where a row has no text to be named by.

    Raises:
        InputError: nothing is there, it cannot be read, or a column is missing or of the wrong type.
    """
    where = str(data.path or data.dataset)
    frame = (
        _read_path(data.path, data.text)
        if data.path
        else _read_dataset(data.model_copy(update={"limit": None}))
    )
    if data.id is None and likely in frame.columns:
        data = data.model_copy(update={"id": likely})
    if data.id is None:
        _need(frame, data.text, where)
        names = [None if text is None else content_id(text) for text in frame[data.text].cast(pl.String)]
        identity = pl.Series(f"hash of {data.text!r}", names, dtype=pl.String)
    else:
        _need(frame, data.id, where)
        identity = _identity(frame, data, where)
    return frame, identity


def fingerprint(documents: pl.DataFrame) -> str:
    """Name a set of documents by ids and texts, whatever their order: 16 hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for line in sorted(f"{id_}\0{text}" for id_, text in documents.select("id", "text").iter_rows()):
        digest.update(hashlib.sha256(line.encode()).digest())
    return digest.hexdigest()[:16]


def hold_out(
    documents: pl.DataFrame, targets: Targets, seed: int
) -> tuple[pl.DataFrame, dict[str, pl.DataFrame]]:
    """Set aside the documents of each target.

    The choice depends on the seed and the text alone, not on the order of the documents. A document whose
    text also stands in a target is not trained on, and neither is one that shares an id with it.

    Args:
        documents: as :func:`read_documents` gives them.
        targets: the section ``targets`` of the configuration.
        seed: of the choice.

    Returns:
        The documents to train on, and the documents of each target.

    Raises:
        InputError: a value has too few documents, or nothing would be left to train on.
    """
    if targets.files:
        held = {name: read_documents(Data(path=path)) for name, path in targets.files.items()}
    else:
        held = dict(_draw(documents, targets, seed))
    texts = pl.concat([frame["text"] for frame in held.values()])
    kept = documents.filter(~pl.col("text").is_in(texts.implode()))
    if not targets.files:
        ids = pl.concat([frame["id"] for frame in held.values()])
        kept = kept.filter(~pl.col("id").is_in(ids.implode()))
    if kept.is_empty():
        raise InputError(f"no document is left to train on: all {documents.height} stand in a target")
    return kept, held


def _draw(documents: pl.DataFrame, targets: Targets, seed: int) -> Iterator[tuple[str, pl.DataFrame]]:
    pool = documents.unique("text", maintain_order=True).unique("id", maintain_order=True)
    order = [hashlib.sha256(f"{seed}:{text}".encode()).digest() for text in pool["text"]]
    pool = pool.with_columns(pl.Series("_order", order)).sort("_order").drop("_order")
    if targets.by is None:
        yield "held_out", _take(pool, targets.documents, "held_out")
        return
    _need(documents, targets.by, "targets.by")
    if targets.by in RESERVED:
        raise InputError(
            f"targets.by: documents cannot be grouped by a column named {targets.by!r}; rename it"
        )
    values = pool[targets.by].cast(pl.String)
    names = targets.values or sorted(values.drop_nulls().unique())
    if len(names) > MOST_TARGETS:
        raise InputError(
            f"targets.by: {targets.by!r} has {len(names)} values, and each would be a target; "
            f"choose up to {MOST_TARGETS} in targets.values"
        )
    for name in names:
        if name not in values:
            raise InputError(
                f"targets.values: no document has {targets.by} = {name!r}{_nearest(name, values)}: "
                "name a value of that column"
            )
        yield name, _take(pool.filter(values == name), targets.documents, name)


def _take(pool: pl.DataFrame, count: int, target: str) -> pl.DataFrame:
    if pool.height < count:
        raise InputError(
            f"the target {target!r} has {pool.height} documents; targets.documents asks for {count}: take fewer"
        )
    return pool.head(count)


def _identity(frame: pl.DataFrame, data: Data, where: str) -> pl.Series:
    if data.id is None:
        return pl.Series([content_id(text) for text in frame[data.text]])
    identity = frame[data.id]
    if not (identity.dtype.is_integer() or identity.dtype == pl.String):
        raise InputError(
            f"{where}: the ids in {data.id!r} are {identity.dtype}; they must be integers or strings"
        )
    if identity.null_count():
        raise InputError(
            f"{where}: {identity.null_count()} documents have no id in the column {data.id!r}: give every one an id"
        )
    if not identity.dtype.is_integer():
        return identity
    signed: pl.Series = identity.cast(pl.Int64, strict=False)
    if signed.null_count():
        wide = identity.filter(signed.is_null())[0]
        raise InputError(
            f"{where}: the ids in {data.id!r} reach {wide}, beyond a signed number of 64 bits: store them as "
            "strings"
        )
    return signed


def _read_path(path: Path, text: str) -> pl.DataFrame:
    try:
        frame = _read(path.expanduser(), text)
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read ({error.strerror or _first_line(error)}): check its permissions"
        ) from error
    if frame.is_empty():
        raise InputError(f"no document was found in {path}: name a folder or a file that has some")
    return frame


def _read(path: Path, text: str) -> pl.DataFrame:
    if not path.exists():
        raise InputError(f"data.path: there is no {path}: name a folder or a file")
    if path.is_dir():
        return pl.DataFrame(
            list(_read_folder(path, text)), schema=dict.fromkeys((text, "file", "folder"), pl.String)
        )
    if path.suffix == ".parquet":
        path.open("rb").close()  # what polars says of a file that it may not read has neither number nor name
        try:
            return pl.read_parquet(path)
        except pl.exceptions.PolarsError as error:
            raise InputError(
                f"{path} cannot be read as Parquet ({_first_line(error)}): write it anew"
            ) from error
    if path.suffix in (".jsonl", ".ndjson"):
        return pl.DataFrame(list(_read_json_lines(path)), infer_schema_length=None, strict=False)
    raise InputError(
        f"data.path: {path} is neither a folder nor a .jsonl or .parquet file: name one of these"
    )


def _read_folder(folder: Path, text: str) -> Iterator[dict[str, str]]:
    skipped: list[str] = []
    for file in sorted(_files(folder)):
        inside = file.relative_to(folder)
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            skipped.append(str(inside))
            continue
        yield {text: content, "file": inside.as_posix(), "folder": inside.parent.as_posix()}
    if skipped:
        _warn(f"{folder}: {len(skipped)} files are not UTF-8 text and are left out, {skipped[0]} first")


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden; OSError if a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would go on without what lies there

    for place, inner, names in os.walk(folder, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        files = (Path(place, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:  # it may begin with a byte-order mark
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f'{path}, line {number}: expected an object, such as {{"text": ...}}')
                if r"\ud" in line or r"\uD" in line:
                    _check_pairs(row, f"{path}, line {number}")
                yield row
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not valid JSON ({error.msg}): write one object per line"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: convert it") from error


def _check_pairs(row: dict[str, Any], where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise InputError(
            f"{where}: {half} is half a character (a lone surrogate): write the whole pair, or leave it out"
        ) from error


def _read_dataset(data: Data) -> pl.DataFrame:
    datasets = require("datasets", "datasets")
    split = f"{data.split}[:{data.limit}]" if data.limit else data.split
    try:
        frame: pl.DataFrame = datasets.load_dataset(data.dataset, data.subset, split=split).to_polars()
    except Exception as error:  # the library raises whatever its network and file layers raise
        advice = "is the name right and the machine online? Files of your own go into data.path"
        raise InputError(
            f"the data set {data.dataset!r} cannot be loaded ({_first_line(error)}); {advice}"
        ) from error
    return frame


def _need(frame: pl.DataFrame, column: str, where: str) -> None:
    if column not in frame.columns:
        near = _nearest(column, pl.Series(frame.columns))
        raise InputError(
            f"{where}: there is no column {column!r}{near} (columns: {', '.join(frame.columns)})"
        )


def _nearest(name: str, valid: pl.Series) -> str:
    guess = did_you_mean(name, valid.drop_nulls().unique().to_list())
    return f"; {guess}" if guess else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _warn(message: str) -> None:
    warnings.warn(message, AssayWarning, stacklevel=3)
