"""The run folders of processes that trained together, read as one.

Process 0 writes the run's own folder, every other one a run folder of its own below it, `processes/0001` and so on.
Values are the rows of all. The account is the same in all, since a step's sums were taken over the processes before
they were booked; of each step and target the first one found counts.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from assay.errors import AssayWarning, StoreError
from assay.store.folder import RunFolder
from assay.store.header import Header
from assay.store.schema import SHARDS
from assay.store.tensors import TensorFiles

if TYPE_CHECKING:
    from assay.rows import Folder

__all__ = ["MergedFolders", "open_folders", "shard_of"]


def shard_of(out: str | Path | None, rank: int) -> str | Path | None:
    """Where a process writes, for a run with this `out`.

    Example:
        >>> shard_of("runs/gpt", 0), shard_of("runs/gpt", 3).as_posix()
        ('runs/gpt', 'runs/gpt/processes/0003')
    """
    return out if out is None or rank == 0 else Path(out) / SHARDS / f"{rank:04d}"


def open_folders(path: Path) -> RunFolder | MergedFolders:
    """A run folder with those of the other processes, if there are any.

    Raises:
        StoreError: a folder cannot be read, or its run is another one.

    Warns:
        AssayWarning: a process's folder is missing.
    """
    first = RunFolder(path)
    below = path / SHARDS
    found = sorted(p for p in below.iterdir() if p.is_dir()) if below.is_dir() else []
    _warn_of_missing(first, {p.name for p in found})
    if not found:
        return first
    with ThreadPoolExecutor() as pool:
        return MergedFolders(first, list(pool.map(RunFolder, found)))


def _warn_of_missing(first: RunFolder, found: set[str]) -> None:
    known = first.header.info.get("processes")
    size = known.get("size", 1) if isinstance(known, dict) else 1
    missing = [rank for rank in range(1, size if isinstance(size, int) else 1) if f"{rank:04d}" not in found]
    if missing:
        warnings.warn(
            f"the folder of process {missing[0]} is missing from {first.path / SHARDS}: the values of its samples "
            f"are not in this ledger; copy {SHARDS}/{missing[0]:04d} there from the machine that it ran on",
            AssayWarning,
            stacklevel=4,
        )


class MergedFolders:
    """Several run folders as one.

    Args:
        first: of process 0.
        others: of the other processes.
    """

    def __init__(self, first: RunFolder, others: list[RunFolder]) -> None:
        self.first, self.path = first, first.path
        self.folders = [first, *others]
        kinds = {folder.header.ids for folder in self.folders} - {None}
        for folder in others:
            if folder.header.targets != first.header.targets:
                raise StoreError(
                    f"{folder.path} has other targets than {first.path}: move it out of the folder"
                )
        if len(kinds) > 1:
            raise StoreError(
                f"the processes of {first.path} recorded ids of different kinds: use one kind in a run"
            )
        self._kept = [folder for folder in self.folders if folder.header.ids is not None] or [first]

    @property
    def header(self) -> Header:
        """Targets and info."""
        return self.first.header

    @property
    def gradients(self) -> Folder:
        """Where gradients of the run's samples are recorded."""
        return self.first.gradients

    @property
    def snapshots(self) -> TensorFiles:
        """Where snapshots of the run are."""
        return self.first.snapshots

    def values(self) -> pl.LazyFrame:
        """Rows of values, step by step."""
        frames = [folder.values() for folder in self._kept]
        return pl.concat(frames, how="vertical").sort("step", maintain_order=True)

    def account(self) -> pl.LazyFrame:
        """Rows of the account, once each."""
        rows = pl.concat([folder.account() for folder in self.folders], how="vertical")
        return rows.unique(["step", "target"], keep="first", maintain_order=True).sort(
            "step", maintain_order=True
        )

    def metadata(self) -> pl.LazyFrame:
        """Metadata, one row per id."""
        frames = [folder.metadata() for folder in self._kept]
        rows = pl.concat(frames, how="diagonal_relaxed")
        return rows.group_by("id", maintain_order=True).agg(pl.all().drop_nulls().last())

    def rows(self, table: str) -> pl.LazyFrame | None:
        """Rows of one of `schema.DETAILS`; None if the run has none."""
        frames = [rows for folder in self._kept if (rows := folder.rows(table)) is not None]
        return pl.concat(frames, how="vertical").sort("step", maintain_order=True) if frames else None

    def side(self) -> dict[str, pl.LazyFrame]:
        """Side tables by name."""
        return self.first.side()

    def verify(self) -> None:
        """Compare every file with its checksum; StoreError names the first one that is damaged."""
        for folder in self.folders:
            folder.verify()
