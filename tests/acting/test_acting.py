"""Selections and credits against plain Python over the same rows."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import assay
from assay.acting import credit, select
from assay.errors import InputError
from assay.store import RunWriter


def record(
    samples: int = 60, out: Any = None, explained: float = 1.0, targets: tuple[str, ...] = ("code", "law")
) -> Any:
    """Three steps of every sample; samples 0, 3, 6, … come from provider p0, and so on; number 7 has none."""
    rng = np.random.default_rng(4)
    writer = RunWriter(out, targets, {"methods": [{"method": "in-run shapley", "path": "left"}]})
    rows = [
        {"id": f"s{i:03d}", "provider": f"p{i % 3}", "year": 2000 + i % 2} for i in range(samples) if i != 7
    ]
    writer.add_metadata(pl.DataFrame(rows))
    for step in range(3):
        values = rng.normal(0.02, 0.1, (samples, len(targets)))
        writer.add_values(step, 0, [f"s{i:03d}" for i in range(samples)], values)
        for k, name in enumerate(targets):
            predicted = values[:, k].sum()
            writer.add_account(step, name, predicted, 0.0, 0.0, predicted / explained, 0.0)
    table = {"parameter": ["a", "b"], "entries": [3, 1], "status": ["exact", "excluded"]}
    writer.add_table("coverage", pl.DataFrame(table))
    writer.close()
    return writer.ledger


@pytest.fixture
def ledger() -> Any:
    return record()


def plain(ledger: Any, *targets: str) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for target in targets:
        for _, id_, value in ledger.steps(target).iter_rows():
            total[id_] += value
    return dict(total)


@pytest.mark.parametrize("targets", [["code"], ["law", "code"]])
@pytest.mark.parametrize(
    ("drop", "keep"), [("negative", None), (None, 0.3), (None, 7), ("negative", 0.5), (None, 1.0)]
)
@pytest.mark.parametrize("per", [None, "provider"])
def test_a_selection_is_what_a_loop_would_keep(
    ledger: Any, targets: list[str], drop: Any, keep: Any, per: str | None
) -> None:
    found = select(ledger, targets, drop=drop, keep=keep, per=per)
    values = plain(ledger, *targets)
    group = dict(ledger.metadata().select("id", "provider").iter_rows())
    pools: dict[Any, list[str]] = defaultdict(list)
    for id_ in sorted(values, key=lambda id_: -values[id_]):
        if drop is None or values[id_] >= 0:
            pools[group.get(id_) if per else None].append(id_)
    expected = set()
    for pool in pools.values():
        count = len(pool) if keep is None else keep if isinstance(keep, int) else round(keep * len(pool))
        expected |= set(pool[:count])
    assert set(found.kept) == expected
    assert found.table.height == len(values)
    assert found.statement["kept"] == len(expected)
    assert found.statement["value_of_kept"] == pytest.approx(math.fsum(values[i] for i in expected))
    assert found.statement["value_of_all"] == pytest.approx(math.fsum(values.values()))


@pytest.mark.parametrize("format", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("unseen", ["keep", "drop"])
def test_the_filtered_data_is_written(ledger: Any, tmp_path: Path, format: Any, unseen: Any) -> None:
    rows = [{"url": f"s{i:03d}", "text": f"text {i} ünd\n", "n": i} for i in range(0, 70)]
    chosen = select(ledger, "code", drop="negative")
    written = chosen.write(tmp_path / "out", pl.DataFrame(rows), "url", format, unseen)
    dropped = set(chosen.table["id"]) - set(chosen.kept)
    expected = [row for row in rows if row["url"] not in dropped and (unseen == "keep" or row["n"] < 60)]
    path = written[1]
    if format == "jsonl":
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    elif format == "parquet":
        found = pl.read_parquet(path).to_dicts()
    else:
        datasets = pytest.importorskip("datasets")
        found = datasets.load_from_disk(str(path)).to_list()
    assert found == expected
    assert pl.read_parquet(written[0]).filter("kept")["id"].to_list() == chosen.kept.to_list()
    statement = json.loads(written[-1].read_text())
    assert statement["rule"] == {"drop": "negative", "keep": None, "per": None}
    assert statement["explained"] == {"code": pytest.approx(1)}
    assert statement["coverage"] == {"exact": 0.75, "excluded": 0.25}
    assert statement["methods"][0]["path"] == "left"
    assert statement["data"] == {"rows": 70, "kept": len(expected), "unseen": 10}
    with pytest.raises(InputError, match="already holds"):
        chosen.write(tmp_path / "out")


def test_ids_of_another_kind_are_refused(ledger: Any) -> None:
    with pytest.raises(InputError, match="are Int64"):
        select(ledger, "code", keep=3).filter(pl.DataFrame({"id": [1]}))
    with pytest.raises(InputError, match="no column 'id'"):
        select(ledger, "code", keep=3).filter(pl.DataFrame({"x": [1]}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "what to drop"),
        ({"keep": 0.0}, "between 0 and 1"),
        ({"keep": 1.5}, "between 0 and 1"),
        ({"keep": 0}, "at least 1"),
        ({"keep": True}, "fraction"),
        ({"drop": "positive"}, "negative"),
        ({"keep": 0.5, "per": "nowhere"}, "nowhere"),
        ({"keep": 0.5, "target": "cod"}, "did you mean 'code'"),
    ],
)
def test_what_cannot_be_selected(ledger: Any, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(ledger, arguments.pop("target", "code"), **arguments)


def test_shares_are_those_of_a_loop_and_add_up(ledger: Any) -> None:
    found = credit(ledger, "provider", ["code", "law"])
    values = plain(ledger, "code", "law")
    provider = dict(ledger.metadata().select("id", "provider").iter_rows())
    sums: dict[Any, list[float]] = defaultdict(list)
    for id_, value in values.items():
        sums[provider.get(id_)].append(value)
    total = math.fsum(values.values())
    for name, samples, value, share, *_ in found.table.iter_rows():
        assert samples == len(sums[name])
        assert value == pytest.approx(math.fsum(sums[name]))
        assert share == pytest.approx(math.fsum(sums[name]) / total)
    assert found.table["share"].sum() == pytest.approx(1)
    assert None in found.table["provider"]
    assert found.statement["targets"] == ["code", "law"]


@pytest.mark.parametrize("samples", [60, 9000])  # the second one is resampled in blocks
def test_the_interval_is_a_bootstraps(samples: int) -> None:
    ledger = record(samples)
    found = credit(ledger, "provider", "code", resamples=4000)
    pairs = [
        (dict(ledger.metadata().select("id", "provider").iter_rows()).get(id_), value)
        for id_, value in plain(ledger, "code").items()
    ] if samples < 100 else None  # fmt: skip
    if pairs is not None:
        rng, resampled = random.Random(0), defaultdict(list)
        for _ in range(4000):
            sums: dict[Any, float] = defaultdict(float)
            for name, value in rng.choices(pairs, k=len(pairs)):
                sums[name] += value
            total = sum(sums.values())
            for name in set(dict(pairs)):
                resampled[name].append(sums[name] / total)
        for name, _, _, _, low, high in found.table.iter_rows():
            width = np.quantile(resampled[name], 0.975) - np.quantile(resampled[name], 0.025)
            assert low == pytest.approx(np.quantile(resampled[name], 0.025), abs=0.08 * width)
            assert high == pytest.approx(np.quantile(resampled[name], 0.975), abs=0.08 * width)
        return
    # many samples: the normal limit of a ratio of sums (delta method)
    joined = ledger.values("code").join(ledger.metadata(), on="id", how="left")
    value = joined["value"].to_numpy()
    for name, _, _, share, low, high in found.table.iter_rows():
        if name is None:
            continue
        inside = (joined["provider"] == name).fill_null(False).to_numpy() * value
        error = (inside - share * value).std() * math.sqrt(len(value)) / value.sum()
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)


@pytest.mark.parametrize("name", ["steps", "place", "share", "low", "high", "source"])
def test_a_source_may_have_any_name(name: str) -> None:
    writer = RunWriter(None, ["t"])
    writer.add_values(0, 0, [1, 2, 3], np.array([[1.0], [2.0], [1.0]]))
    writer.add_values(1, 0, [1, 2, 3], np.array([[1.0], [2.0], [1.0]]))
    writer.add_metadata(pl.DataFrame({"id": [1, 2, 3], name: ["x", "x", "y"]}))
    found = credit(writer.ledger, name)
    own = "source" if name in ("share", "low", "high") else name
    assert found.table.columns == [own, "samples", "value", "share", "low", "high"]
    assert found.table.select(own, "samples", "value", "share").rows() == [
        ("x", 2, 6.0, 0.75),
        ("y", 1, 2.0, 0.25),
    ]
    assert found.statement["by"] == name
    assert select(writer.ledger, keep=1, per=name).kept.to_list() == [2, 3]


def test_what_has_nothing_to_share_out() -> None:
    writer = RunWriter(None, ["t"])
    writer.add_values(0, 0, [1, 2], np.array([[-1.0], [0.5]]))
    writer.add_metadata(pl.DataFrame({"id": [1, 2], "provider": ["a", "b"]}))
    with pytest.raises(InputError, match="no improvement"):
        credit(writer.ledger, "provider")
    with pytest.raises(InputError, match="did you mean 'provider'"):
        credit(writer.ledger, "provide")
    with pytest.raises(InputError, match="no values"):
        select(RunWriter(None, ["t"]).ledger, drop="negative")


def test_cautions_say_what_does_not_close() -> None:
    statement = select(record(explained=3.0), "code", drop="negative").statement
    assert any("300%" in line for line in statement["caution"])
    assert any("25.0%" in line for line in statement["caution"])
    assert assay.Ledger is not None


@pytest.mark.parametrize("broken", [1, 3])
def test_steps_that_are_not_finite_are_said(broken: int) -> None:
    writer = RunWriter(None, ["t"])
    writer.add_metadata(pl.DataFrame({"id": [1, 2], "provider": ["a", "b"]}))
    for step in range(3):
        bad = step >= 3 - broken
        number = math.nan if bad else 2.0
        writer.add_values(step, 0, [1, 2], np.array([[number / 2], [number / 2]]))
        writer.add_account(step, "t", number, 0.0, 0.0, number, 0.0, "nan" if bad else "ok")
    said = f"{broken} of 3 steps are not finite"
    (caution,) = select(writer.ledger, keep=1).statement["caution"]
    assert said in caution
    if broken == 3:
        with pytest.raises(InputError, match=f"add up to 0: .*; {said}"):
            credit(writer.ledger, "provider")
    else:
        assert said in credit(writer.ledger, "provider").statement["caution"][0]
