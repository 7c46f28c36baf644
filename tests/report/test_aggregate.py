"""Every aggregate of the report against plain Python loops over the same rows."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.report import aggregate

SHOWN = ["law", "code"]


@pytest.mark.parametrize("bins", [1, 7, 60, 1000])
def test_composition_equals_a_loop(ledger, bins):
    groups = ledger.metadata().select("id", pl.col("domain").alias("group"))
    sums = aggregate.by_group(ledger.steps("code"), groups, SHOWN, "others")
    found = aggregate.composition(sums, [*SHOWN, "others"], bins)

    group_of = dict(groups.iter_rows())
    rows = [row for row in ledger.steps("code").iter_rows() if math.isfinite(row[2])]
    first, last = min(r[0] for r in rows), max(r[0] for r in rows)
    width = math.ceil((last - first + 1) / bins)
    expected = defaultdict(float)
    for step, identity, value in rows:
        end = min(first + ((step - first) // width + 1) * width - 1, last)
        group = group_of.get(identity, "(none)")
        expected[end, group if group in SHOWN else "others"] += value

    ends = sorted({end for end, _ in expected})
    assert found.height == len(ends) * 3
    running = defaultdict(float)
    for (end, group, value, cumulative), (want_end, want_group) in zip(
        found.iter_rows(), [(e, g) for e in ends for g in [*SHOWN, "others"]], strict=True
    ):
        assert (end, group) == (want_end, want_group)
        running[group] += expected[end, group]
        assert value == pytest.approx(expected[end, group], abs=1e-15)
        assert cumulative == pytest.approx(running[group], abs=1e-15)


def test_composition_ends_at_the_values_of_the_ledger(ledger):
    groups = ledger.metadata().select("id", pl.col("domain").alias("group"))
    by = {group or aggregate.UNNAMED: value for group, value, *_ in ledger.by("domain", "law").iter_rows()}
    sums = aggregate.by_group(ledger.steps("law"), groups, list(by), "others")
    last = aggregate.composition(sums, list(by), 13).group_by("group").agg(pl.col("cumulative").last())
    assert dict(last.iter_rows()) == pytest.approx(by, abs=1e-15)


def test_without_groups_there_is_one(ledger):
    sums = aggregate.by_group(ledger.steps("code"), None, [], "")
    assert sums["group"].unique().to_list() == [aggregate.EVERYTHING]
    assert sums["value"].sum() == pytest.approx(ledger.values("code")["value"].sum())


@pytest.mark.parametrize("bins", [1, 9, 500])
def test_account_equals_a_loop_over_the_steps_that_count(ledger, bins):
    steps = aggregate.counted(ledger.account("code"))
    found = aggregate.account(steps, bins)
    rows = [r for r in ledger.account("code").iter_rows(named=True) if r["status"] == "ok"]
    assert steps.height == len(rows) == 59
    for name in aggregate.ACCOUNT_COLUMNS:
        running = 0.0
        for end, total, cumulative in found.select("step", name, f"cumulative_{name}").iter_rows():
            here = sum(r[name] for r in rows if r["step"] <= end)
            assert cumulative == pytest.approx(here, abs=1e-15)
            assert total == pytest.approx(here - running, abs=1e-15)
            running = here


def test_totals_of_the_account_are_those_of_the_ledgers_explained_share(ledger):
    total = aggregate.counted(ledger.account("law")).sum().row(0, named=True)
    share = (total["predicted"] + total["carried"] + total["decayed"]) / total["actual"]
    assert share == pytest.approx(ledger.explained("law"))


@pytest.mark.parametrize(
    ("status", "actual", "counts"), [("ok", 1.0, True), ("ok", math.nan, False), ("nan", 1.0, False)]
)
def test_a_step_counts_when_it_is_known(status, actual, counts):
    row = {"step": 0, "predicted": 1.0, "carried": 0.0, "decayed": 0.0, "actual": actual, "residual": 0.0}
    frame = pl.DataFrame([row | {"status": status}])
    assert (aggregate.counted(frame).height == 1) == counts


@given(
    st.lists(st.floats(-1e3, 1e3).map(lambda v: v if abs(v) > 1e-9 else 0.0), max_size=300),
    st.sampled_from([1.0, 1e-12, 1e6]),
)
def test_histogram_counts_every_value_once_and_parts_at_zero(values, factor):
    values = np.array(values) * factor
    found = aggregate.histogram(values)
    for low, high, count in zip(found.edges[:-1], found.edges[1:], found.counts, strict=True):
        top = values <= high if high == found.edges[-1] else values < high
        assert count == ((values >= low) & top).sum()
    assert found.counts.sum() + found.below + found.above == len(values)
    if len(values):
        assert (found.edges == 0.0).sum() == 1
        negative = found.counts[found.edges[1:] <= 0].sum() + found.below
        assert negative == (values < 0).sum()


def test_histogram_is_not_squeezed_by_an_outlier():
    values = np.concatenate([np.linspace(-1, 1, 999), [1e6]])
    found = aggregate.histogram(values)
    assert found.above == (values > found.edges[-1]).sum() >= 1
    assert found.edges[-1] < 1.1
    assert (found.counts > 0).sum() > 20


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_extremes_are_the_ends_of_the_sorted_values(ledger, count):
    helpful, harmful = aggregate.extremes(ledger.values("code"), count)
    values = sorted(ledger.values("code")["value"])
    assert helpful["value"].to_list() == [v for v in reversed(values) if v > 0][:count]
    assert harmful["value"].to_list() == [v for v in values if v < 0][:count]


def test_grouping_several_columns_equals_the_ledgers_own(ledger):
    frames = aggregate.by_columns(ledger.values("code"), ledger.metadata(), ["domain", "year"])
    for column, frame in frames.items():
        wanted = ledger.by(column, "code").sort(column)
        assert frame.columns == wanted.columns
        for got, want in zip(frame.sort(column).iter_rows(), wanted.iter_rows(), strict=True):
            assert got[0] == want[0]
            assert got[1:] == pytest.approx(want[1:], abs=1e-15)


def test_prominent_groups_weigh_targets_alike():
    frames = {
        "large": pl.DataFrame({"domain": ["a", "b", "c"], "value": [900.0, -100.0, 0.0]}),
        "small": pl.DataFrame({"domain": ["a", "b", "c"], "value": [0.0, 0.0, 0.001]}),
    }
    assert aggregate.prominent(frames, "domain", 2) == (["c", "a"], 1)
    zero = {"t": pl.DataFrame({"domain": ["a", None], "value": [0.0, 0.0]})}
    assert aggregate.prominent(zero, "domain", 5) == (["(none)", "a"], 0)


def test_columns_that_group_are_told_from_texts_measures_and_names():
    count = 40
    metadata = pl.DataFrame(
        {
            "id": range(count),
            "source": [f"site {i % 3}" for i in range(count)],
            "domain": [f"d{i % 2}" for i in range(count)],
            "year": [2000 + i % 5 for i in range(count)],
            "url": [f"https://example.org/{i}" for i in range(count)],
            "length": [float(i % 4) for i in range(count)],
            "same": ["x"] * count,
            "text": ["t"] * (count - 1) + ["u"],
            "body": ["long " * 100] * (count - 1) + ["other " * 100],
            "value": [i % 2 for i in range(count)],
            "tags": [["a"]] * count,
        }
    )
    assert aggregate.group_columns(metadata) == ["domain", "source", "year"]
    assert aggregate.group_columns(metadata, limit=2) == ["domain", "source"]


@pytest.mark.parametrize("bins", [1, 4, 100])
def test_binned_curves_are_means_over_the_steps_of_a_bin(bins):
    frame = pl.DataFrame({"step": [3, 4, 6, 9, 12], "loss": [1.0, 2.0, math.nan, 4.0, 8.0]})
    width = math.ceil(10 / bins)
    expected = defaultdict(list)
    for step, loss in frame.iter_rows():
        expected[min(3 + ((step - 3) // width + 1) * width - 1, 12)].append(loss)
    for end, loss in aggregate.binned(frame, ["loss"], bins).iter_rows():
        known = [v for v in expected.pop(end) if math.isfinite(v)]
        assert loss == (pytest.approx(sum(known) / len(known)) if known else None)
    assert not expected
