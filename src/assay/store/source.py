"""Where a ledger's tables come from: the one form in which it sees a run folder, its shards, or a run in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import polars as pl

from assay.store.header import Header
from assay.store.tensors import TensorFiles

if TYPE_CHECKING:
    from assay.rows import Folder

__all__ = ["Source"]


class Source(Protocol):
    """All that a run has recorded, as lazy frames: the one form in which the ledger sees disk and memory."""

    @property
    def header(self) -> Header:
        """Targets and info."""

    @property
    def path(self) -> Path | None:
        """The run folder; None in memory."""

    def values(self) -> pl.LazyFrame:
        """Columns of `schema.values_schema`."""

    def account(self) -> pl.LazyFrame:
        """Columns of `schema.ACCOUNT`."""

    def metadata(self) -> pl.LazyFrame:
        """A column `id` and the user's, one row per id."""

    def rows(self, table: str) -> pl.LazyFrame | None:
        """Rows of one of `schema.DETAILS`; None if the run has none."""

    def side(self) -> dict[str, pl.LazyFrame]:
        """Side tables by name."""

    @property
    def gradients(self) -> Folder:
        """Where gradients of the run's samples are recorded."""

    @property
    def snapshots(self) -> TensorFiles:
        """Where snapshots of the run are."""

    def verify(self) -> None:
        """StoreError that names a damaged file, if there is one."""
