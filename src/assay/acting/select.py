"""Which samples to keep."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from assay.acting.statement import describe, summed, targets_of
from assay.errors import InputError, StoreError
from assay.store import Ledger

__all__ = ["Format", "Selection", "select"]

Format = Literal["jsonl", "parquet", "dataset"]


@dataclass(frozen=True)
class Selection:
    """The samples to keep, and how they were chosen.

    Attributes:
        table: `id, value, kept` of every sample of the run, the largest value first; with `group` where the choice
            was made within groups.
        statement: how the choice was made, as JSON.
    """

    table: pl.DataFrame
    statement: dict[str, Any]

    @property
    def kept(self) -> pl.Series:
        """Ids that stay, the largest value first."""
        return self.table.filter("kept")["id"]

    def filter(
        self, data: pl.DataFrame, id: str | pl.Series = "id", unseen: Literal["keep", "drop"] = "keep"
    ) -> pl.DataFrame:
        """The rows of a table whose samples stay.

        Args:
            data: any table.
            id: its column of ids, or the id of each row.
            unseen: what becomes of rows that the run never saw, and so did not value.

        Raises:
            InputError: no such column, or ids of another kind than the run's.
        """
        names = self._names(data, id)
        if unseen == "drop":
            return data.filter(names.is_in(self.kept.implode()).fill_null(False))
        dropped = self.table.filter(~pl.col("kept"))["id"]
        return data.filter(~names.is_in(dropped.implode()).fill_null(False))

    def _names(self, data: pl.DataFrame, id: str | pl.Series) -> pl.Series:
        if isinstance(id, str) and id not in data.columns:
            raise InputError(
                f"the data has no column {id!r}, only {', '.join(map(repr, data.columns))}: name one"
            )
        names = data[id] if isinstance(id, str) else id
        ids = self.table["id"]
        if names.dtype.is_integer() != ids.dtype.is_integer():
            raise InputError(
                f"the data's ids in {names.name!r} are {names.dtype}, those of the run {ids.dtype}: name the column "
                "that the run was given"
            )
        return names

    def write(
        self,
        folder: str | Path,
        data: pl.DataFrame | None = None,
        id: str | pl.Series = "id",
        format: Format = "jsonl",
        unseen: Literal["keep", "drop"] = "keep",
    ) -> list[Path]:
        """Write the ids, how they were chosen, and the filtered data.

        Args:
            folder: made here; `ids.parquet`, `selection.json`, and `data.jsonl`, `data.parquet` or `dataset/`.
            data: the data to filter; none is written without it.
            id: its column of ids, or the id of each row.
            format: of the data; "dataset" is a Hugging Face data set (`datasets.load_from_disk`).
            unseen: see `filter`.

        Returns:
            What was written.

        Raises:
            InputError: see `filter`, none of the data's ids is one of the run's, or a selection lies there already.
            StoreError: the disk refuses.
        """
        folder = Path(folder)
        if (folder / "selection.json").exists():
            raise InputError(f"{folder} already holds a selection: choose another folder")
        filtered = None if data is None else self.filter(data, id, unseen)
        statement = dict(self.statement)
        if data is not None and filtered is not None:
            names = self._names(data, id)
            seen = int(names.is_in(self.table["id"].implode()).sum())
            if data.height and not seen:  # a filter that filters nothing is a wrong column, not a choice
                raise InputError(
                    f"none of the data's {data.height} ids in {names.name!r} is one of the run's: name the column "
                    "that the run was given"
                )
            statement["data"] = {"rows": data.height, "kept": filtered.height, "unseen": data.height - seen}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            written = [folder / "ids.parquet"]
            self.table.write_parquet(written[0])
            if filtered is not None:
                written.append(_write_data(filtered, folder, format))
            written.append(folder / "selection.json")
            written[-1].write_text(json.dumps(statement, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StoreError(
                f"cannot write {folder} ({error.strerror or error}): choose another folder"
            ) from error
        return written


def select(
    ledger: Ledger,
    target: str | list[str] | None = None,
    *,
    drop: Literal["negative"] | None = None,
    keep: float | int | None = None,
    per: str | None = None,
) -> Selection:
    """Choose which samples to keep by their values.

    A value says what a sample did in *this* run; dropping it changes what all others do. Train again on what is kept
    before you trust it, and look at more than one target.

    Args:
        ledger: of a run.
        target: a target or several, whose values are added up.
        drop: "negative" drops the samples that raised the loss.
        keep: how many to keep: a fraction up to 1.0, or a whole number. With `drop`, of those that are left.
        per: a metadata column; the choice is made within each of its groups, so that the mixture stays.

    Raises:
        InputError: neither `drop` nor `keep`, a number out of range, or unknown names.

    Example:
        >>> import numpy as np
        >>> from assay.store import RunWriter
        >>> writer = RunWriter(None, targets=["code"])
        >>> writer.add_values(0, 0, ["a", "b", "c"], np.array([[0.5], [-0.25], [0.1]]))
        >>> select(writer.ledger, drop="negative").kept.to_list()
        ['a', 'c']
        >>> select(writer.ledger, keep=1).kept.to_list()
        ['a']
    """
    if drop is None and keep is None:
        raise InputError('select: say what to drop (drop="negative") or how many to keep (keep=0.8)')
    if drop not in (None, "negative"):
        raise InputError(f'select(drop={drop!r}) is not known: use "negative"')
    _check_keep(keep)
    targets = targets_of(ledger, target)
    table = summed(ledger, targets).drop("steps")
    if per is not None:
        ledger.by(per, targets[0])  # raises, with the columns there are
        groups = ledger.metadata().select("id", group=pl.col(per).cast(pl.String))
        table = table.join(groups, on="id", how="left").sort("value", "id", descending=[True, False])
    stays = pl.col("value") >= 0 if drop else pl.lit(True)
    table = table.with_columns(kept=stays)
    if keep is not None:
        table = table.with_columns(kept=pl.col("kept") & _largest(keep, "group" if per else None))
    return Selection(table, _state(ledger, targets, table, drop, keep, per))


def _largest(keep: float | int, group: str | None) -> pl.Expr:
    """Whether a sample is among the first `keep` of those that are left; rows are in order of value."""
    rank = pl.col("kept").cum_sum()
    count = pl.col("kept").sum()
    limit = pl.lit(keep) if isinstance(keep, int) else (count * keep).round()
    first = rank <= limit
    return first if group is None else first.over(group)


def _check_keep(keep: float | int | None) -> None:
    if keep is None:
        return
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise InputError(f"select(keep={keep!r}) must be a fraction such as 0.8, or a whole number")
    if isinstance(keep, int) and keep < 1:
        raise InputError(f"select(keep={keep!r}) must be at least 1; as a fraction write 1.0")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise InputError(
            f"select(keep={keep!r}) must lie between 0 and 1 as a fraction; a count is a whole number"
        )


def _state(
    ledger: Ledger,
    targets: list[str],
    table: pl.DataFrame,
    drop: str | None,
    keep: float | int | None,
    per: str | None,
) -> dict[str, Any]:
    kept = table.filter("kept")
    return {
        **describe(ledger, targets),
        "rule": {"drop": drop, "keep": keep, "per": per},
        "samples": table.height,
        "kept": kept.height,
        "value_of_all": float(table["value"].sum()),
        "value_of_kept": float(kept["value"].sum()),
    }


def _write_data(frame: pl.DataFrame, folder: Path, format: Format) -> Path:
    if format == "jsonl":
        path = folder / "data.jsonl"
        frame.write_ndjson(path)
    elif format == "parquet":
        path = folder / "data.parquet"
        frame.write_parquet(path)
    elif format == "dataset":
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise InputError(
                "a Hugging Face data set needs datasets: pip install 'assay[datasets]'"
            ) from error
        path = folder / "dataset"
        datasets.Dataset.from_polars(frame).save_to_disk(str(path))
    else:
        raise InputError(f"format {format!r} is not known: use 'jsonl', 'parquet' or 'dataset'")
    return path
