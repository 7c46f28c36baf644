"""Repeating a run from what its folder says of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from assay.errors import InputError
from assay.store import Ledger
from assay.train.config import Config

__all__ = ["Again", "config_of", "differences", "id_column"]


@dataclass(frozen=True)
class Again:
    """How a repeated run compares with the first one.

    Attributes:
        same: whether every value is the same, bit for bit.
        largest: the largest difference of two values of a sample at a step, over the largest value.
        missing: samples at steps that only one of the runs has.
    """

    same: bool
    largest: float
    missing: int


def config_of(ledger: Ledger) -> tuple[Config, list[str]]:
    """The configuration of a run of `assay train`, and what is not as it was then.

    Args:
        ledger: of the run.

    Returns:
        The configuration, relative paths resolved against the directory that the run was started in, and a line for
        each library that has another version now.

    Raises:
        InputError: the run was not made by `assay train`.
    """
    info = ledger.info
    try:
        config = Config.model_validate(info["config"])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{ledger.path} holds no configuration of `assay train`: it was recorded by a loop of its own, which "
            "only that loop can repeat"
        ) from error
    start = Path(info.get("working_directory", "."))
    data = config.data.model_copy(update={"path": config.data.path and _from(start, config.data.path)})
    files = {name: _from(start, path) for name, path in config.targets.files.items()}
    model = config.model
    if not Path(model.name).exists() and (start / model.name).exists():
        model = model.model_copy(update={"name": str(start / model.name)})
    targets = config.targets.model_copy(update={"files": files})
    config = config.model_copy(update={"data": data, "targets": targets, "model": model})
    return config, _other_versions(info.get("versions", {}))


def id_column(ledger: Ledger) -> str | None:
    """The column that the documents of a run were named by: None for a hash of the text, or a loop of its own."""
    return config_of(ledger)[0].data.id if "config" in ledger.info else None


def differences(first: Ledger, second: Ledger) -> Again:
    """Compare the values of two runs, sample by sample and step by step."""
    largest, missing, same = 0.0, 0, first.targets == second.targets
    for target in first.targets if same else []:
        a, b = first.steps(target), second.steps(target)
        same = same and a.equals(b, null_equal=True)
        sums = [f.group_by("step", "id").agg(pl.col("value").sum()) for f in (a, b)]
        both = sums[0].join(sums[1], on=["step", "id"], suffix="_again")
        missing += len(sums[0]) + len(sums[1]) - 2 * len(both)
        scale = both["value"].abs().max()
        gap = (both["value"] - both["value_again"]).abs().max()
        if isinstance(scale, float) and isinstance(gap, float) and scale > 0:
            largest = max(largest, gap / scale)
    return Again(same, largest, missing)


def _from(start: Path, path: Path) -> Path:
    return path if path.is_absolute() or not (start / path).exists() else start / path


def _other_versions(then: dict[str, Any]) -> list[str]:
    lines = []
    for name, version in then.items():
        now = sys.version.split()[0] if name == "python" else _installed(name)
        if now != version:
            lines.append(f"{name} was {version} and is now {now or 'not installed'}")
    return lines


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    if name in sys.modules:
        return getattr(sys.modules[name], "__version__", None)
    try:
        return version(name)
    except PackageNotFoundError:
        return None
