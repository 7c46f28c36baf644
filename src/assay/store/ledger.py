"""The ledger: what every sample was worth, read from a run folder or from a run that still goes on."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from assay.errors import InputError, StoreError
from assay.store.files import local_path, one_line
from assay.store.folder import RunFolder
from assay.store.header import Header
from assay.store.schema import value_column


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

    def side(self) -> dict[str, pl.LazyFrame]:
        """Side tables by name."""

    def verify(self) -> None:
        """StoreError that names a damaged file, if there is one."""


def open_ledger(path: str | Path) -> Ledger:
    """Open the ledger of a run folder.

    A run that is still being written, or that was killed, opens too: the ledger holds what had reached the
    disk by now. Every file's footer is read and checked; `Ledger.verify` reads all of the rest.

    Args:
        path: The `out=` of a run.

    Raises:
        StoreError: No run folder, a damaged file (named), or a format newer than this version of assay.

    Warns:
        AssayWarning: A part is missing.

    Example:
        >>> import tempfile, numpy as np
        >>> from assay.store import RunWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = RunWriter(f"{folder}/run", targets=["code"])
        ...     writer.add_values(0, 0, ["a", "b"], np.array([[0.5], [-0.25]]))
        ...     writer.close()
        ...     open_ledger(f"{folder}/run").values("code").rows()
        [('a', 0.5, 1), ('b', -0.25, 1)]
    """
    return Ledger(RunFolder(local_path(path)))


class Ledger:
    """What a run has recorded about its samples and steps.

    Signs and units: a positive value means that the sample lowered the target's loss; values and every line
    of the account are in the unit of that loss. Wherever a method takes a target, it may be left out if the
    run has one target only; a name that the run does not know is an `InputError` that lists the known ones.

    Obtained from `open_ledger` or from a writer; one obtained from a writer sees whatever is added later.

    Args:
        source: Where the tables come from.

    Example:
        >>> import numpy as np, polars as pl
        >>> from assay.store import RunWriter
        >>> writer = RunWriter(None, targets=["code"])
        >>> writer.add_values(0, 0, [7, 8], np.array([[0.5], [-0.25]]))
        >>> writer.add_values(1, 0, [7, 9], np.array([[1.0], [0.25]]))
        >>> ledger = writer.ledger
        >>> ledger.values().rows()
        [(7, 1.5, 2), (9, 0.25, 1), (8, -0.25, 1)]
        >>> writer.add_metadata(pl.DataFrame({"id": [7, 8, 9], "domain": ["law", "law", "math"]}))
        >>> ledger.by("domain").rows()
        [('law', 1.25, 2, 0.5, 0.625), ('math', 0.25, 1, 0.0, 0.25)]
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def targets(self) -> list[str]:
        """Names of the run's targets."""
        return list(self._source.header.targets)

    @property
    def info(self) -> dict[str, Any]:
        """The JSON object that the run's writer left, a copy."""
        return copy.deepcopy(self._source.header.info)

    @property
    def path(self) -> Path | None:
        """The run folder, None for a run in memory."""
        return self._source.path

    @property
    def tables(self) -> list[str]:
        """Names that `table` knows."""
        return sorted(self._source.side())

    def values(self, target: str | None = None) -> pl.DataFrame:
        """Value of every sample over the whole run.

        A sample that was seen several times adds up. A row whose value is not finite (a step with NaN, which
        the account marks) adds nothing, but its step counts as seen.

        Args:
            target: Name of the target.

        Returns:
            Frame `id`, `value` (float64, positive = lowered the loss), `steps` (number of different
            optimizer steps in which the sample was seen), the largest value first, equal values by id.
        """
        return self._collect(self._values(target))

    def steps(self, target: str | None = None) -> pl.DataFrame:
        """Value of every sample at every step.

        Args:
            target: Name of the target.

        Returns:
            Frame `step`, `id`, `value`, one row per sample and micro-batch in the order of recording; NaN is
            kept.
        """
        return self._collect(self._rows(target))

    def account(self, target: str | None = None) -> pl.DataFrame:
        """How much of each step's change of the loss the values explain.

        Args:
            target: Name of the target.

        Returns:
            Frame `step`, `predicted` (the step's values, summed), `carried` (momentum of earlier steps),
            `decayed` (weight decay), `actual` (the loss's measured fall), `residual`, `status`: "ok", "nan"
            or "skipped".
        """
        name = self._target(target)
        account = self._source.account()
        return self._collect(account.filter(pl.col("target") == name).drop("target"))

    def explained(self, target: str | None = None) -> float:
        """Share of the actual fall of the loss that the account explains.

        Sum of predicted + carried + decayed over sum of actual, over the steps whose status is "ok" and whose
        four numbers are all known.

        Args:
            target: Name of the target.

        Returns:
            The share, 1.0 where the account closes; NaN where no step counts or the loss did not change.
        """
        numbers = ["predicted", "carried", "decayed", "actual"]
        ok = self.account(target).filter(
            pl.col("status") == "ok", pl.all_horizontal(pl.col(numbers).is_finite())
        )
        predicted, carried, decayed, actual = (math.fsum(ok[name]) for name in numbers)
        return (predicted + carried + decayed) / actual if actual else math.nan

    def by(self, column: str, target: str | None = None) -> pl.DataFrame:
        """Values grouped by a column of the metadata.

        Samples without metadata are one group too, named null, so that the sums add up to the run's.

        Args:
            column: A column of the metadata.
            target: Name of the target.

        Returns:
            Frame `column`, `value` (sum over the group's samples), `samples` (how many), `negative` (share
            of them with a value below zero), `mean` (value per sample), the largest sum first.
        """
        values = self._values(target)
        metadata = self._source.metadata()
        with self._reading():
            types = metadata.collect_schema()
        known = [name for name in types if name != "id"]
        if column not in known:
            raise _unknown("metadata column", column, known, "add_metadata gives samples their columns")
        if types[column].is_nested():
            raise InputError(f"metadata column {column!r} has type {types[column]}: group by a plain column")
        if column in ("value", "samples", "negative", "mean"):
            raise InputError(
                f"metadata column {column!r} has the name of a result: rename it in the metadata"
            )
        value = pl.col("value")
        sums = (
            values.join(metadata.select("id", column), on="id", how="left")
            .group_by(column)
            .agg(value, samples=pl.len().cast(pl.Int64), negative=(value < 0).mean())
            .with_columns(value.list.sum())
            .with_columns(mean=value / pl.col("samples"))
        )
        return self._collect(sums.sort("value", column, descending=[True, False], nulls_last=True))

    def metadata(self) -> pl.DataFrame:
        """The metadata: a frame with `id` and the columns that were given, one row per sample."""
        return self._collect(self._source.metadata())

    def table(self, name: str) -> pl.DataFrame:
        """A side table, such as the loss curve, as it was last given."""
        side = self._source.side()
        if name not in side:
            raise _unknown("table", name, side, "add_table makes one")
        return self._collect(side[name])

    def verify(self) -> None:
        """Read all that lies on the disk and compare the checksum of every page.

        Raises:
            StoreError: The first damaged file, by name.
        """
        self._source.verify()

    def _rows(self, target: str | None, *more: str) -> pl.LazyFrame:
        value = pl.col(value_column(self._target(target))).alias("value")
        return self._source.values().select("step", "id", value, *more)

    def _values(self, target: str | None) -> pl.LazyFrame:
        value = pl.col("value")
        taken = pl.col("step").filter(pl.col("micro") >= 0)  # below: what momentum brought to a later step
        # Summed as lists: a grouped sum adds in the order in which threads happen to finish, so that its last
        # bits would differ from call to call.
        sums = (
            self._rows(target, "micro")
            .group_by("id")
            .agg(value.filter(value.is_finite()), steps=taken.n_unique().cast(pl.Int64))
            .with_columns(value.list.sum())
        )
        return sums.sort("value", "id", descending=[True, False])

    def _target(self, target: str | None) -> str:
        known = self._source.header.targets
        if target is None and len(known) == 1:
            return known[0]
        if target is None:
            raise InputError(f"this run has {len(known)} targets ({_listed(known)}): name one")
        if target not in known:
            raise _unknown("target", target, known, "it was recorded with none")
        return target

    def _collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        with self._reading():
            return frame.collect()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what the reader of Parquet says into one line, with the name of a damaged file."""
        try:
            yield
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            self._source.verify()
            raise StoreError(
                f"the run cannot be read ({one_line(error)}): check its disk, then open it again"
            ) from error


def _unknown(what: str, name: object, known: Iterable[str], hint: str) -> InputError:
    """One line for a name that is not there: the nearest one, and all."""
    known = list(known)
    if not known:
        return InputError(f"no {what} {name!r}: this run has none; {hint}")
    near = difflib.get_close_matches(str(name), known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"no {what} {name!r}: {guess}known are {_listed(known)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
