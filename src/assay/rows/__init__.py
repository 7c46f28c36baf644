"""Rows of projected gradients on disk, in object storage or in memory: Zarr v3 through TensorStore.

    manifest.json          what is committed: rows, their type and width, whether the store is complete
    data/                  the rows `[N, width]`, a Zarr v3 array, sharded along N, CRC-32C on every chunk
    scales/                for int8: one float32 per row and block, `[N, blocks]`
    table/part-000000-…    one Parquet file per commit: the ids and whatever else is known of the rows

A commit is one shard of rows: the shard, then its table, then the manifest, which alone makes them visible. What a
killed writer left beyond the manifest is written again. Several processes write one store by taking turns, shard by
shard, each with a manifest of its own; `join` makes it complete.
"""

from assay.rows.background import Background
from assay.rows.folder import Folder
from assay.rows.format import DTYPES, RowDtype
from assay.rows.product import products
from assay.rows.reader import RowReader
from assay.rows.share import Share
from assay.rows.writer import RowWriter, join

__all__ = [
    "DTYPES",
    "Background",
    "Folder",
    "RowDtype",
    "RowReader",
    "RowWriter",
    "Share",
    "join",
    "products",
]
