"""Going on with a run that its folder holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from assay.errors import InputError
from assay.store.cuts import end_of
from assay.store.folder import RunFolder
from assay.store.header import NAME, Cut, Header
from assay.store.schema import SHARDS

__all__ = ["account_of", "cut_header", "overrule_others", "overruled_ids", "recorded"]


def recorded(path: Path) -> RunFolder | None:
    """The run that a folder holds, every file compared with its checksum; None if it holds none.

    Raises:
        StoreError: The run is damaged.
    """
    return RunFolder(path) if (path / NAME).exists() else None


def account_of(path: Path) -> pl.DataFrame | None:
    """`step, skipped` of the steps that a folder's account holds; None if it holds no run.

    Where a row of the account stands for a block of steps, the values tell the others.
    """
    before = recorded(path)
    if before is None:
        return None
    rows = before.account().group_by("step").agg(skipped=(pl.col("status") == "skipped").all())
    methods = before.header.info.get("methods") or []
    if any(method.get("refresh", 1) > 1 for method in methods):
        valued = before.values().select("step").unique().with_columns(skipped=pl.lit(False))
        rows = pl.concat([rows, valued]).unique("step", keep="first", maintain_order=True)
    return rows.sort("step").collect()


def cut_header(before: RunFolder, step: int, targets: tuple[str, ...], info: dict[str, Any]) -> Header:
    """The header of a run that goes on at a step.

    Raises:
        InputError: It has other targets or methods than the one that began it.
    """
    header = before.header
    if header.targets != targets:
        raise InputError(
            f"Run(resume=...): {before.path} has the targets {', '.join(header.targets)} and not "
            f"{', '.join(targets)}; go on with the same ones, or choose another out=."
        )
    for key in ("methods", "parameters"):
        known, now = header.info.get(key), json.loads(json.dumps(info.get(key)))
        if known is not None and now is not None and known != now:
            raise InputError(
                f"Run(resume=...): {before.path} was recorded with {key} {known} and not {now}; go on with the same "
                "ones, or choose another out=."
            )
    known, now = header.info.get("weights"), json.loads(json.dumps(info.get("weights")))
    if known is not None and now is not None and known != now:
        one, other = (f"{of['parameters']} parameters of {of['entries']} entries" for of in (known, now))
        raise InputError(
            f"Run(resume=...): {before.path} was recorded of another model: {one}, and now {other}, or other names and "
            "shapes; go on with the same (and the same ones frozen or excluded), or choose another out=."
        )
    ends = {table: end_of(parts) for table, parts in before.parts.items() if table != "metadata"}
    return replace(header, parts=None, cuts=(*header.cuts, Cut(step, ends))).merged(info)


def overruled_ids(before: RunFolder, step: int) -> dict[tuple[int, int], list[int | str]]:
    """The ids of every micro-batch, by step and number, that was recorded from a step on, and will be again."""
    rows = before.values().filter((pl.col("step") >= step) & (pl.col("micro") >= 0))
    found = rows.group_by("step", "micro", maintain_order=True).agg("id").collect()
    return {(step, micro): ids for step, micro, ids in found.iter_rows()}


def overrule_others(path: Path, step: int, size: int) -> None:
    """Cut the folders of processes that a run with fewer of them no longer has."""
    below = path / SHARDS
    for folder in sorted(below.iterdir()) if below.is_dir() else []:
        if folder.name.isdigit() and int(folder.name) >= size and (before := recorded(folder)) is not None:
            cut_header(before, step, before.header.targets, {}).write(folder)
