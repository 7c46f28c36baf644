"""What each source contributed to the improvement that the values explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from assay.acting.statement import describe, not_finite, summed, targets_of
from assay.errors import InputError
from assay.store import Ledger

__all__ = ["Credit", "credit"]

BLOCKS = 4000
"""A run of more samples is resampled in this many random blocks, which costs the interval next to nothing."""


@dataclass(frozen=True)
class Credit:
    """Each source's share, and how it was made.

    Attributes:
        table: the grouping column (called `source` where it has the name of another column here), `samples`, `value`
            (sum), `share` (of all values; they add up to 1, and one below zero is a source that raised the loss), `low`
            and `high` (interval of the share), the largest share first.
        statement: how the shares were made, as JSON.
    """

    table: pl.DataFrame
    statement: dict[str, Any]


def credit(
    ledger: Ledger,
    by: str,
    target: str | list[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Credit:
    """Share the explained improvement out to the sources of the samples.

    A source's share is the sum of its samples' values over the sum of all values. The interval is a percentile
    bootstrap over samples (Efron and Tibshirani 1993, section 13.3), all values of a sample staying together: how far
    the share would move with other samples from the same sources. What another seed or order of training would have
    given is not in it.

    Args:
        ledger: of a run.
        by: the metadata column that names the source; samples without one are a source of their own, null.
        target: a target or several, whose values are added up.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: unknown names, scipy is not installed, or the values do not add up to an improvement.

    Example:
        >>> import numpy as np
        >>> from assay.store import RunWriter
        >>> writer = RunWriter(None, targets=["code"])
        >>> writer.add_values(0, 0, [1, 2, 3, 4], np.array([[0.5], [0.25], [0.5], [0.25]]))
        >>> writer.add_metadata(pl.DataFrame({"id": [1, 2, 3, 4], "provider": ["x", "x", "x", "y"]}))
        >>> shares = credit(writer.ledger, "provider").table
        >>> [round(share, 3) for share in shares["share"]]
        [0.833, 0.167]
        >>> bool((shares["low"] <= shares["share"]).all() and (shares["share"] <= shares["high"]).all())
        True
    """
    if not 0 < level < 1:
        raise InputError(f"credit(level={level!r}) must lie between 0 and 1, such as 0.95")
    targets = targets_of(ledger, target)
    ledger.by(by, targets[0])  # raises, with the columns there are
    sources = ledger.metadata().select(
        "id", source=pl.col(by)
    )  # whatever its name, it meets no other column's
    values = summed(ledger, targets).drop("steps").join(sources, on="id", how="left")
    total = float(values["value"].sum())
    if not total > 0:
        broken = "; ".join(line for name in targets if (line := not_finite(ledger, name)))
        raise InputError(
            f"the values add up to {total:.3g}: no improvement of {', '.join(map(repr, targets))} is left to share out"
            + (f"; {broken}" if broken else "")
        )
    table = (
        values.group_by("source")
        .agg(samples=pl.len().cast(pl.Int64), value=pl.col("value").sum())
        .with_columns(share=pl.col("value") / total)
        .sort("share", "source", descending=[True, False], nulls_last=True)
    )
    low, high = _interval(values, table["source"], level, resamples, seed)
    table = table.with_columns(low=pl.Series(low), high=pl.Series(high))
    statement = {
        **describe(ledger, targets),
        "by": by,
        "share": "sum of the source's values over the sum of all values",
        "value_of_all": total,
        "interval": {
            "level": level,
            "method": "percentile bootstrap over samples",
            "resamples": resamples,
            "seed": seed,
        },
    }
    return Credit(table if by in table.columns else table.rename({"source": by}), statement)


def _interval(
    values: pl.DataFrame, sources: pl.Series, level: float, resamples: int, seed: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """`[sources]` each: ends of the shares' intervals."""
    try:
        from scipy.stats import bootstrap
    except ModuleNotFoundError as error:
        raise InputError("intervals need scipy: pip install 'assay[evaluate]'") from error
    rng = np.random.default_rng(seed)
    sums = _blocks(values, sources, rng)  # [sources, blocks]
    if sums.shape[1] < 2:
        return np.full(len(sums), np.nan), np.full(len(sums), np.nan)

    def shares(x: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
        of_sources: np.ndarray[Any, Any] = x.sum(axis)  # [sources, resamples]
        total: np.ndarray[Any, Any] = of_sources.sum(0)
        found: np.ndarray[Any, Any] = of_sources / total
        return found

    found = bootstrap(
        (sums,), shares, axis=-1, confidence_level=level, n_resamples=resamples, batch=25, method="percentile",
        rng=rng,
    ).confidence_interval  # fmt: skip
    return np.atleast_1d(found.low), np.atleast_1d(found.high)


def _blocks(values: pl.DataFrame, sources: pl.Series, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """`[sources, blocks]`: sums of the values of each source in each random block of samples."""
    place = pl.DataFrame(
        {"source": sources, "place": np.arange(len(sources))},
        schema_overrides={"source": values.schema["source"]},
    )
    placed = values.sort("id").join(place, on="source", how="left", nulls_equal=True, maintain_order="left")
    blocks = min(placed.height, BLOCKS)
    block = rng.permutation(placed.height) % blocks
    sums = np.zeros((len(sources), blocks))
    np.add.at(sums, (placed["place"].to_numpy(), block), placed["value"].to_numpy())
    return sums
