"""Reading a run folder: which files belong to the run, and whether they are whole."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from assay.errors import AssayWarning, StoreError
from assay.store.cuts import stack_below, stepwise
from assay.store.files import (
    FrameFile,
    damaged,
    frame_file,
    frame_schema,
    scan_frames,
    unreadable,
    verify_frame,
)
from assay.store.header import NAME, Header, read_header
from assay.store.parts import PART, merge
from assay.store.schema import (
    ACCOUNT,
    DETAILS,
    PARTED,
    STEPWISE,
    TABLES,
    metadata_schema,
    values_schema,
)
from assay.store.tensors import TensorFiles, snapshot_files

if TYPE_CHECKING:
    from assay.rows import Folder


def gradients_folder(path: Path | None) -> Folder:
    """Where gradients of a run's samples are recorded: below its folder, or in memory."""
    from assay.rows import Folder  # rows reports its errors as this package does, and is imported by it last

    return Folder(None if path is None else path / "embeddings")


class RunFolder:
    """The files of a run, as they were when it was opened.

    Args:
        path: The `out=` of a run.

    Raises:
        StoreError: No run folder, a damaged file (named), or a format newer than this version of assay.

    Warns:
        AssayWarning: A part is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header
        self._parts: dict[str, list[Path]] = {}
        self._side: dict[str, Path] = {}
        try:
            self._look()
        except StoreError:  # a run that goes on may have written between two looks at its folder
            self._look()

    @cached_property
    def gradients(self) -> Folder:
        """Where gradients of the run's samples are recorded."""
        return gradients_folder(self.path)

    @cached_property
    def snapshots(self) -> TensorFiles:
        """Where snapshots of the run are."""
        return snapshot_files(self.path)

    def values(self) -> pl.LazyFrame:
        """Rows of values."""
        return stack_below(self._parts["values"], "values", self.header.cuts, self._values_schema)

    def account(self) -> pl.LazyFrame:
        """Rows of the account."""
        return stack_below(self._parts["account"], "account", self.header.cuts, ACCOUNT)

    def metadata(self) -> pl.LazyFrame:
        """Metadata, one row per id."""
        return merge(self._parts["metadata"], metadata_schema(self.header.ids))

    def rows(self, table: str) -> pl.LazyFrame | None:
        """Rows of one of `schema.DETAILS`; None if the run has none."""
        parts = self._parts.get(table)
        return stack_below(parts, table, self.header.cuts, pl.Schema()) if parts else None

    @property
    def parts(self) -> dict[str, list[Path]]:
        """The parts of each table, in order."""
        return self._parts

    @property
    def side_files(self) -> dict[str, Path]:
        """The file of each side table."""
        return self._side

    def side(self) -> dict[str, pl.LazyFrame]:
        """Side tables by name, those that grow with the steps among them.

        Where one of these has no part, a run of an older assay may have kept it as a whole.
        """
        whole = {name: scan_frames([path]) for name, path in self._side.items()}
        return whole | stepwise(self._parts, self.header.cuts)

    def verify(self) -> None:
        """Compare every file with its checksum; StoreError names the first one that is damaged."""
        paths = [path for paths in self._parts.values() for path in paths] + list(self._side.values())
        with ThreadPoolExecutor() as pool:  # the checksum releases the interpreter's lock
            for _ in pool.map(verify_frame, paths):
                pass

    def _look(self) -> None:
        self.header = read_header(self.path)
        recorded = [table for table in (*DETAILS, *STEPWISE) if (self.path / table).is_dir()]
        for table in (*PARTED, *recorded):
            self._parts[table] = self._list(table)
        self._side = self._list_side()
        self.verify()
        self._check_schemas()

    @property
    def _values_schema(self) -> pl.Schema:
        return values_schema(self.header.targets, self.header.ids)

    def _list(self, table: str) -> list[Path]:
        """Parts of a table in order, with a warning for those that should be there and are not."""
        numbered: dict[int, Path] = {}
        for path, file in self._frame_files(table):
            if file.name == PART and numbered.setdefault(file.number, path) != path:
                raise damaged(path, f"{numbered[file.number].name} has the same number")
        expected = max(numbered, default=-1) + 1
        if self.header.parts is not None:
            expected = max(expected, self.header.parts.get(table, 0))
        missing = [number for number in range(expected) if number not in numbered]
        if missing:
            warnings.warn(
                f"{len(missing)} of the {expected} parts of {self.path / table} are missing, the first is "
                f"number {missing[0]}: their rows are not in this ledger",
                AssayWarning,
                stacklevel=5,
            )
        return [numbered[number] for number in sorted(numbered)]

    def _list_side(self) -> dict[str, Path]:
        """The newest file of each side table."""
        newest: dict[str, tuple[int, Path]] = {}
        for path, file in self._frame_files(TABLES):
            newest[file.name] = max(newest.get(file.name, (-1, path)), (file.number, path))
        return {name: path for name, (_, path) in sorted(newest.items())}

    def _frame_files(self, folder: str) -> list[tuple[Path, FrameFile]]:
        try:
            paths = sorted((self.path / folder).iterdir())
        except PermissionError as error:
            raise unreadable(self.path / folder, error) from error
        except OSError as error:
            raise StoreError(
                f"cannot read {self.path / folder} ({error.strerror}): put the folder back"
            ) from error
        return [(path, file) for path in paths if (file := frame_file(path)) is not None]

    def _check_schemas(self) -> None:
        """Compare the columns of every part with those that the header promises."""
        for table, schema in (("values", self._values_schema), ("account", ACCOUNT)):
            for path in self._parts[table]:
                if frame_schema(path) != schema:
                    raise damaged(path, f"its columns are not those that {NAME} promises")
        ids = metadata_schema(self.header.ids)["id"]
        for path in self._parts["metadata"]:
            if frame_schema(path).get("id") != ids:
                raise damaged(path, f"its ids are not those that {NAME} promises")
        for path in self._side.values():
            frame_schema(path)
