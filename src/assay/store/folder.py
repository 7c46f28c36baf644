"""Reading a run folder: which files belong to the run, and whether they are whole."""

from __future__ import annotations

import warnings
from pathlib import Path

import polars as pl

from assay.errors import AssayWarning, StoreError
from assay.store.files import damaged, read_schema, verify_parquet
from assay.store.header import NAME, Header, read_header
from assay.store.parts import merge, part_number, part_path, scan, stack
from assay.store.schema import ACCOUNT, PARTED, metadata_schema, values_schema

TABLES = "tables"


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
        self.header: Header = read_header(path)
        self._parts = {table: self._list(table) for table in PARTED}
        self._side = sorted((path / TABLES).glob("*.parquet"))
        self._check()

    def values(self) -> pl.LazyFrame:
        """Rows of values."""
        return stack(self._parts["values"], self._values_schema)

    def account(self) -> pl.LazyFrame:
        """Rows of the account."""
        return stack(self._parts["account"], ACCOUNT)

    def metadata(self) -> pl.LazyFrame:
        """Metadata, one row per id."""
        return merge(self._parts["metadata"], metadata_schema(self.header.ids))

    def side(self) -> dict[str, pl.LazyFrame]:
        """Side tables by name."""
        return {path.stem: scan(path) for path in self._side}

    def verify(self) -> None:
        """Read every file to its end; StoreError names the first one that is damaged."""
        for path in [*(path for paths in self._parts.values() for path in paths), *self._side]:
            verify_parquet(path)

    @property
    def _values_schema(self) -> pl.Schema:
        return values_schema(self.header.targets, self.header.ids)

    def _list(self, table: str) -> list[Path]:
        """Parts of a table in order, with a warning for those that should be there and are not."""
        folder = self.path / table
        try:
            numbers = {number: path for path in folder.iterdir() if (number := part_number(path)) is not None}
        except OSError as error:
            raise StoreError(f"cannot read {folder} ({error.strerror}): put the folder back") from error
        expected = max(numbers, default=-1) + 1
        if self.header.parts is not None:
            expected = max(expected, self.header.parts.get(table, 0))
        missing = [number for number in range(expected) if number not in numbers]
        if missing:
            warnings.warn(
                f"{len(missing)} of {expected} parts of {folder} are missing, the first is "
                f"{part_path(folder, missing[0]).name}: its rows are not in this ledger",
                AssayWarning,
                stacklevel=2,
            )
        return [numbers[number] for number in sorted(numbers)]

    def _check(self) -> None:
        """Compare the columns of every part with those that the header promises."""
        for table, schema in (("values", self._values_schema), ("account", ACCOUNT)):
            for path in self._parts[table]:
                if read_schema(path) != schema:
                    raise damaged(path, f"its columns are not those that {NAME} promises")
        ids = metadata_schema(self.header.ids)["id"]
        for path in self._parts["metadata"]:
            if read_schema(path).get("id") != ids:
                raise damaged(path, f"its ids are not those that {NAME} promises")
        for path in self._side:
            read_schema(path)
