"""Values added up: by sample, by token and by a column of the metadata; and the documents of packed rows.

Values are summed as lists: a grouped sum adds in the order in which threads happen to finish, so that its last bits
would differ from call to call.
"""

from __future__ import annotations

import polars as pl

__all__ = ["by_column", "by_sample", "by_token", "documents"]

VALUE = pl.col("value")


def by_sample(rows: pl.LazyFrame, even: bool = False) -> pl.LazyFrame:
    """`id`, `value`, `steps`, the largest value first.

    Args:
        rows: `step`, `micro`, `id`, `value`; a micro-batch below 0 is what momentum brought to a later step.
        even: divide each value by the mean size of its step's first, so that all steps weigh alike.
    """
    finite = VALUE.filter(VALUE.is_finite())
    if even:
        size = finite.abs().mean().over("step")
        rows = rows.with_columns(value=pl.when(size > 0).then(VALUE / size).otherwise(VALUE))
    taken = pl.col("step").filter(pl.col("micro") >= 0)
    sums = rows.group_by("id").agg(finite, steps=taken.n_unique().cast(pl.Int64))
    return sums.with_columns(VALUE.list.sum()).sort("value", "id", descending=[True, False])


def by_token(rows: pl.LazyFrame) -> pl.LazyFrame:
    """`id`, `token`, `value`, `steps`; what has no position comes last, under no token.

    Args:
        rows: `step`, `id`, `value`, a list over the positions, and `rest`.
    """
    long = rows.with_columns(token=pl.int_ranges(VALUE.list.len())).drop("rest")
    long = long.explode("value", "token", empty_as_null=False).with_columns(VALUE.cast(pl.Float64))
    rest = rows.select("step", "id", value=pl.col("rest").cast(pl.Float64), token=pl.lit(None, pl.Int64))
    sums = (
        pl.concat([long, rest], how="diagonal")
        .group_by("id", "token")
        .agg(VALUE.filter(VALUE.is_finite()), steps=pl.col("step").n_unique().cast(pl.Int64))
        .select("id", "token", VALUE.list.sum(), "steps")
    )
    return sums.sort("id", "token", nulls_last=True)


def by_column(values: pl.LazyFrame, metadata: pl.LazyFrame, column: str) -> pl.LazyFrame:
    """`column`, `value`, `samples`, `negative`, `mean`, the largest sum first.

    Args:
        values: of `by_sample`.
        metadata: `id` and the column; samples that it lacks are one group too.
        column: its name.
    """
    sums = (
        values.select("id", VALUE)  # without the steps: a column of the metadata may have their name
        .join(metadata.select("id", column), on="id", how="left")
        .group_by(column)
        .agg(VALUE, samples=pl.len().cast(pl.Int64), negative=(VALUE < 0).mean())
        .with_columns(VALUE.list.sum())
        .with_columns(mean=VALUE / pl.col("samples"))
    )
    return sums.sort("value", column, descending=[True, False], nulls_last=True)


def documents(packed: pl.LazyFrame) -> pl.LazyFrame:
    """`id`, `document`, `tokens`: one row per document of a packed row.

    Args:
        packed: `id` and, as lists, `document` and `tokens`; of several rows with one id the last one holds.
    """
    last = packed.unique("id", keep="last", maintain_order=True)
    return last.select("id", "document", "tokens").explode("document", "tokens")
