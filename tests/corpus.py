"""Short documents of the embedded corpus, as a user's own file."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from assay.demo import CORPUS

__all__ = ["write_documents"]


def write_documents(path: Path, count: int, length: int, texts: dict[int, str] | None = None) -> Path:
    """The first `count` documents as JSON lines, each cut to `length` characters.

    Args:
        path: the file.
        count: documents.
        length: characters of each.
        texts: what some have for a text instead, by their place.
    """
    rows = pl.read_parquet(CORPUS).head(count).with_columns(pl.col("text").str.slice(0, length)).to_dicts()
    for place, text in (texts or {}).items():
        rows[place]["text"] = text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
