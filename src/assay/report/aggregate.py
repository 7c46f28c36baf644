"""What the page shows, reduced from the ledger in polars: nothing here grows with the number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

__all__ = [
    "UNNAMED",
    "Histogram",
    "account",
    "binned",
    "by_columns",
    "by_group",
    "composition",
    "counted",
    "extremes",
    "group_columns",
    "histogram",
    "prominent",
]

EVERYTHING = "all samples"
UNNAMED = "(none)"
RESERVED = ("value", "samples", "negative", "mean")  # what a grouped table calls its own columns
ACCOUNT_COLUMNS = ("predicted", "carried", "decayed", "actual", "residual")


def _bin_end(first: int, last: int, bins: int) -> pl.Expr:
    """Map each step to the last step of its bin; all bins but the last one have the same width."""
    width = max(1, -(-(last - first + 1) // bins))
    end = pl.lit(first) + ((pl.col("step") - first) // width + 1) * width - 1
    return pl.min_horizontal(end, pl.lit(last)).cast(pl.Int64).alias("step")


def _span(frame: pl.DataFrame) -> tuple[int, int]:
    if not frame.height:
        return 0, 0
    first, last = frame.select(pl.col("step").min().alias("first"), pl.col("step").max().alias("last")).row(0)
    return int(first), int(last)


def by_group(steps: pl.DataFrame, groups: pl.DataFrame | None, shown: list[str], rest: str) -> pl.DataFrame:
    """Sum the finite step values by step and group.

    Args:
        steps: Columns step, id, value.
        groups: Columns id, group; None puts every sample into one group.
        shown: Groups to keep apart; all others are summed under the name `rest`.
        rest: Name of that sum.

    Returns:
        Columns step, group, value.
    """
    frame = steps.lazy().filter(pl.col("value").is_finite())
    if groups is None:
        frame = frame.with_columns(pl.lit(EVERYTHING).alias("group"))
    else:
        group = pl.col("group").fill_null(UNNAMED)
        frame = frame.join(groups.lazy(), on="id", how="left").with_columns(
            pl.when(group.is_in(shown)).then(group).otherwise(pl.lit(rest)).alias("group")
        )
    return frame.group_by("step", "group").agg(pl.col("value").sum()).collect()


def composition(sums: pl.DataFrame, order: list[str], bins: int) -> pl.DataFrame:
    """Bin sums by step and group, and accumulate them.

    Args:
        sums: Columns step, group, value, as `by_group` returns them.
        order: The groups, in the order of the page; groups absent from `sums` are left out.
        bins: Largest number of bins.

    Returns:
        Columns step (last of the bin), group, value (sum in the bin), cumulative; every group in every bin.
    """
    binned_sums = (
        sums.with_columns(_bin_end(*_span(sums), bins)).group_by("step", "group").agg(pl.col("value").sum())
    )
    present = set(sums["group"].unique())
    groups = pl.DataFrame({"group": [g for g in order if g in present]}, schema={"group": pl.String})
    groups = groups.with_row_index("place")
    return (
        binned_sums.select("step")
        .unique()
        .join(groups, how="cross")
        .join(binned_sums, on=["step", "group"], how="left")
        .sort("step", "place")
        .drop("place")
        .with_columns(pl.col("value").fill_null(0.0))
        .with_columns(pl.col("value").cum_sum().over("group").alias("cumulative"))
    )


def counted(account: pl.DataFrame) -> pl.DataFrame:
    """The steps of an account that count: taken, and with all numbers known (as in `Ledger.explained`)."""
    known = pl.all_horizontal(pl.col("predicted", "carried", "decayed", "actual").is_finite())
    return account.filter((pl.col("status") == "ok") & known)


def account(steps: pl.DataFrame, bins: int) -> pl.DataFrame:
    """Bin the counted steps of a target's account and accumulate them.

    Returns:
        Columns step (last of the bin), predicted, carried, decayed, actual, residual (sums in the bin) and
        their running sums, named cumulative_predicted and so on.
    """
    columns = pl.col(ACCOUNT_COLUMNS)
    return (
        steps.with_columns(_bin_end(*_span(steps), bins))
        .group_by("step")
        .agg(columns.sum())
        .sort("step")
        .with_columns(columns.cum_sum().name.prefix("cumulative_"))
    )


def binned(frame: pl.DataFrame, columns: list[str], bins: int) -> pl.DataFrame:
    """Mean of each of `columns` over bins of steps."""
    numbers = frame.with_columns(pl.col(columns).cast(pl.Float64).fill_nan(None))
    return (
        numbers.with_columns(_bin_end(*_span(frame), bins))
        .group_by("step")
        .agg(pl.col(columns).mean())
        .sort("step")
    )


@dataclass(frozen=True)
class Histogram:
    """Counts of values between `edges` (one of which is zero), and of the few beyond each end of the axis."""

    edges: np.ndarray  # [bins + 1]
    counts: np.ndarray  # [bins]
    below: int
    above: int


def histogram(values: np.ndarray) -> Histogram:
    """Count values in bins of one width, with zero on an edge so that no bin mixes helpful with harmful.

    The axis spans the central 99 % of the values (and zero): a few outliers would otherwise leave one bar.

    Args:
        values: Shape [N], finite.
    """
    if not len(values):
        return Histogram(np.zeros(1), np.zeros(0, dtype=np.int64), 0, 0)
    bins = int(np.clip(2 * np.sqrt(len(values)), 10, 60))
    low, high = np.minimum(np.quantile(values, 0.005), 0.0), np.maximum(np.quantile(values, 0.995), 0.0)
    width = (high - low) / bins or 1.0
    # One bin more at the top: zero is never the last edge, which np.histogram counts with the bin below it.
    edges = width * np.arange(np.floor(low / width), np.floor(high / width) + 2)
    counts, _ = np.histogram(values, edges)
    return Histogram(edges, counts, int((values < edges[0]).sum()), int((values > edges[-1]).sum()))


def extremes(values: pl.DataFrame, count: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The `count` most helpful (value > 0, best first) and most harmful (value < 0, worst first) samples.

    Args:
        values: Columns id, value, steps, the largest value first.
        count: Largest number of rows in each.
    """
    helpful = values.head(count).filter(pl.col("value") > 0)
    harmful = values.tail(count).filter(pl.col("value") < 0).reverse()
    return helpful, harmful


def group_columns(metadata: pl.DataFrame, limit: int = 12) -> list[str]:
    """Columns that group samples, domain first: no texts, no measures, nothing that differs for nearly each.

    Args:
        metadata: Columns id and whatever the user gave.
        limit: Largest number of columns.
    """
    chosen = []
    for name, dtype in metadata.schema.items():
        if name in ("id", "text", *RESERVED) or not (
            dtype.is_integer() or dtype in (pl.String, pl.Boolean, pl.Categorical, pl.Enum, pl.Date)
        ):
            continue
        if dtype == pl.String and _is_prose(metadata[name]):
            continue
        if 2 <= metadata[name].n_unique() <= max(2, metadata.height // 2):
            chosen.append(name)
    return sorted(chosen, key=lambda name: name != "domain")[:limit]


def _is_prose(texts: pl.Series) -> bool:
    """Whether a column holds texts rather than names, by the mean length of its first thousand."""
    length = texts.head(1000).str.len_chars().mean()
    return isinstance(length, float) and length > 200


def by_columns(
    values: pl.DataFrame, metadata: pl.DataFrame, columns: Sequence[str]
) -> dict[str, pl.DataFrame]:
    """What `Ledger.by` answers for several columns, from values at hand: a million samples are joined once.

    Args:
        values: Columns id, value.
        metadata: Columns id and `columns`.
        columns: Columns to group by.

    Returns:
        By column, a frame of it with value, samples, negative (share) and mean.
    """
    joined = values.select("id", "value").join(metadata.select("id", *columns), on="id", how="left").lazy()
    value = pl.col("value")
    measures = {
        "value": value.sum(),
        "samples": pl.len(),
        "negative": (value < 0).mean(),
        "mean": value.mean(),
    }
    frames = pl.collect_all([joined.group_by(column).agg(**measures) for column in columns])
    return dict(zip(columns, frames, strict=True))


def prominent(frames: dict[str, pl.DataFrame], column: str, limit: int) -> tuple[list[str], int]:
    """The `limit` groups whose value weighs most, over all targets alike, and how many others there are.

    Args:
        frames: Columns `column` and value, by target.
        column: The metadata column.
        limit: Largest number of groups to keep apart.
    """
    share = pl.col("value").abs() / pl.max_horizontal(pl.col("value").abs().sum(), pl.lit(1e-300))
    name = pl.col(column).cast(pl.String).fill_null(UNNAMED).alias("group")
    weights = pl.concat([frame.select(name, share) for frame in frames.values()])
    order = (
        weights.group_by("group").agg(pl.col("value").sum()).sort("value", "group", descending=[True, False])
    )
    return order["group"].head(limit).to_list(), max(0, order.height - limit)
