"""What the ledger answers, on runs small enough to be added up by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from assay.errors import InputError, StoreError
from assay.store import Ledger, RunWriter, open_ledger

NAN = math.nan


def small(out: Path | None = None) -> RunWriter:
    """Two targets; "a" is seen in steps 0 and 1, and twice in step 1."""
    writer = RunWriter(out, ["code", "law"], info={"model": "gpt"})
    writer.add_values(0, 0, ["a", "b"], np.array([[1.0, -1.0], [0.5, 0.25]]))
    writer.add_values(1, 0, ["c", "a"], np.array([[-2.0, 4.0], [0.25, 0.0]]))
    writer.add_values(1, 1, ["a"], np.array([[0.25, 8.0]]))
    writer.add_metadata(pl.DataFrame({"id": ["a", "b", "z"], "domain": ["x", "y", "x"]}))
    return writer


@pytest.fixture(params=["memory", "disk, open", "disk, reopened"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    if request.param == "memory":
        return small().ledger
    writer = small(tmp_path / "run")
    if request.param == "disk, open":
        return writer.ledger
    writer.close()
    return open_ledger(tmp_path / "run")


def test_values_add_up_and_steps_count_once(ledger: Ledger) -> None:
    values = ledger.values("code")
    assert values.rows() == [("a", 1.5, 2), ("b", 0.5, 1), ("c", -2.0, 1)]
    assert values.schema == {"id": pl.String, "value": pl.Float64, "steps": pl.Int64}
    assert ledger.values("law").rows() == [("a", 7.0, 2), ("c", 4.0, 1), ("b", 0.25, 1)]


def test_all_steps_weigh_alike_where_that_is_asked_for(ledger: Ledger) -> None:
    values = dict(ledger.values("code", even=True).select("id", "value").iter_rows())
    steps = ledger.steps("code")
    truth: dict[str, float] = {}
    for step in (0, 1):
        rows = [(i, v) for t, i, v in steps.iter_rows() if t == step]
        size = sum(abs(v) for _, v in rows) / len(rows)
        for i, v in rows:
            truth[i] = truth.get(i, 0.0) + v / size
    assert values == pytest.approx(truth, rel=1e-12)
    assert values != dict(ledger.values("code").select("id", "value").iter_rows())


def test_steps_of_zeros_or_without_numbers_add_nothing_evenly() -> None:
    writer = RunWriter(None, ["t"])
    writer.add_values(0, 0, ["a", "b"], np.zeros((2, 1)))
    writer.add_values(1, 0, ["a", "b"], np.array([[NAN], [3.0]]))
    writer.add_values(2, 0, ["a", "b"], np.array([[NAN], [NAN]]))
    values = dict(writer.ledger.values(even=True).select("id", "value").iter_rows())
    assert values == {"a": 0.0, "b": 1.0}


def test_steps_keep_their_order(ledger: Ledger) -> None:
    assert ledger.steps("code").rows() == [
        (0, "a", 1.0),
        (0, "b", 0.5),
        (1, "c", -2.0),
        (1, "a", 0.25),
        (1, "a", 0.25),
    ]


def test_by_groups_samples_and_shows_those_without_metadata(ledger: Ledger) -> None:
    by = ledger.by("domain", "code")
    assert by.rows() == [("x", 1.5, 1, 0.0, 1.5), ("y", 0.5, 1, 0.0, 0.5), (None, -2.0, 1, 1.0, -2.0)]
    assert by.columns == ["domain", "value", "samples", "negative", "mean"]


def test_a_column_may_have_the_name_of_the_steps() -> None:
    writer = RunWriter(None, ["t"])
    for step in range(3):
        writer.add_values(step, 0, ["a", "b", "c"], np.array([[1.0], [2.0], [4.0]]))
    writer.add_metadata(pl.DataFrame({"id": ["a", "b", "c"], "steps": [7, 7, 9]}))
    assert writer.ledger.by("steps").rows() == [(9, 12.0, 1, 0.0, 12.0), (7, 9.0, 2, 0.0, 4.5)]


def test_info_and_targets(ledger: Ledger) -> None:
    assert ledger.targets == ["code", "law"]
    assert ledger.info == {"model": "gpt"}
    ledger.info["model"] = "another"
    assert ledger.info == {"model": "gpt"}


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda one: one.values(), "this run has 2 targets ('code', 'law'): name one"),
        (lambda one: one.values("cod"), "no target 'cod': did you mean 'code'? known are 'code', 'law'"),
        (lambda one: one.steps("zzz"), "no target 'zzz': known are 'code', 'law'"),
        (lambda one: one.by("domian", "code"), "did you mean 'domain'?"),
        (lambda one: one.by("id", "code"), "no metadata column 'id'"),
        (lambda one: one.table("curve"), "no table 'curve': this run has none"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_those_that_are(
    ledger: Ledger, ask: Any, says: str
) -> None:
    with pytest.raises(InputError) as raised:
        ask(ledger)
    assert says in str(raised.value)


def test_the_only_target_need_not_be_named() -> None:
    writer = RunWriter(None, ["code"])
    writer.add_values(0, 0, [1], np.array([[2.0]]))
    writer.add_account(0, "code", 2.0, 0.0, 0.0, 4.0, 2.0)
    assert writer.ledger.values().equals(writer.ledger.values("code"))
    assert writer.ledger.account().equals(writer.ledger.account("code"))
    assert writer.ledger.explained() == 0.5


def test_a_run_without_targets_says_so() -> None:
    writer = RunWriter(None, [])
    writer.add_values(0, 0, [1, 2], np.empty((2, 0)))
    with pytest.raises(InputError, match="has 0 targets"):
        writer.ledger.values()
    with pytest.raises(InputError, match="no target 'a': this run has none"):
        writer.ledger.values("a")


def test_an_empty_run_gives_empty_tables(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", ["t"]).close()
    ledger = open_ledger(tmp_path / "run")
    assert ledger.values().columns == ["id", "value", "steps"]
    assert ledger.steps().is_empty()
    assert ledger.account().columns[0] == "step"
    assert ledger.metadata().columns == ["id"]
    assert math.isnan(ledger.explained())


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_kept_in_steps_and_left_out_of_the_sum(bad: float) -> None:
    writer = RunWriter(None, ["t"])
    writer.add_values(0, 0, [1, 2], np.array([[1.0], [3.0]]))
    writer.add_values(1, 0, [1, 9], np.array([[bad], [bad]]))
    assert writer.ledger.values().rows() == [(2, 3.0, 1), (1, 1.0, 2), (9, 0.0, 1)]
    kept = writer.ledger.steps()["value"].to_list()
    assert kept[:2] == [1.0, 3.0]
    assert all(str(value) == str(bad) for value in kept[2:])


def test_account_and_explained(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", ["code", "law"])
    writer.add_account(0, "code", 1.0, 0.5, 0.25, 2.0, 0.25)
    writer.add_account(0, "law", 9.0, 9.0, 9.0, 9.0, -18.0)
    writer.add_account(1, "code", 0.75, 0.25, 0.25, 0.5, -0.75)
    writer.add_account(2, "code", NAN, NAN, NAN, NAN, NAN, status="nan")
    writer.add_account(3, "code", 7.0, 7.0, 7.0, 7.0, 7.0, status="skipped")
    writer.add_account(4, "code", 1.0, 0.0, 0.0, NAN, NAN)  # the fall of the last step was not measured
    writer.close()
    ledger = open_ledger(tmp_path / "run")
    account = ledger.account("code")
    assert account.columns == ["step", "predicted", "carried", "decayed", "actual", "residual", "status"]
    assert account["step"].to_list() == [0, 1, 2, 3, 4]
    assert account["status"].to_list() == ["ok", "ok", "nan", "skipped", "ok"]
    assert ledger.explained("code") == (1.75 + 1.25) / 2.5
    assert ledger.explained("law") == 3.0


def test_equal_values_are_ordered_by_id_and_sums_do_not_depend_on_threads() -> None:
    generator = np.random.default_rng(0)
    writer = RunWriter(None, ["t"], flush_every=5_000)
    expected = dict.fromkeys(range(50), 0.0)
    for step in range(400):
        ids, values = generator.integers(0, 50, 100), generator.standard_normal((100, 1))
        writer.add_values(step, 0, ids, values)
        for at, value in zip(ids.tolist(), values[:, 0].tolist(), strict=True):
            expected[at] += value
    first = writer.ledger.values()
    assert all(writer.ledger.values().equals(first) for _ in range(10))
    assert {row[0]: row[1] for row in first.rows()} == pytest.approx(expected, rel=1e-12, abs=1e-12)
    ties = RunWriter(None, ["t"])
    ties.add_values(0, 0, [3, 1, 2], np.ones((3, 1)))
    assert ties.ledger.values()["id"].to_list() == [1, 2, 3]


def test_metadata_may_come_in_pieces(tmp_path: Path) -> None:
    pieces = [
        {"id": [1, 2], "domain": ["x", "y"]},
        {"id": [2, 3], "domain": ["z", None], "year": [None, 2001]},
        {"id": [1], "domain": [None], "year": [1999]},
    ]
    expected = {1: ("x", 1999), 2: ("z", None), 3: (None, 2001)}
    for out, flush in [(None, False), (None, True), (tmp_path / "one", False), (tmp_path / "many", True)]:
        writer = RunWriter(out, ["t"])
        for piece in pieces:
            writer.add_metadata(pl.DataFrame(piece))
            if flush:
                writer.flush()
        for ledger in (
            [writer.ledger] if out is None else [writer.ledger, (writer.close(), open_ledger(out))[1]]
        ):
            got = {row["id"]: (row["domain"], row["year"]) for row in ledger.metadata().to_dicts()}
            assert got == expected


def test_repeated_rows_of_metadata_are_one_and_contradictions_are_refused() -> None:
    writer = RunWriter(None, ["t"])
    writer.add_metadata(pl.DataFrame({"id": [1, 1], "tags": [["a"], ["a"]]}))
    assert len(writer.ledger.metadata()) == 1
    with pytest.raises(InputError, match="2 contradictory rows, the first for id 5"):
        writer.add_metadata(pl.DataFrame({"id": [5, 6, 5], "tags": [["a"], ["a"], ["b"]]}))


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        ({"id": [1]}, "must be a polars DataFrame, not dict"),
        (pl.DataFrame({"name": [1]}), "no column 'id', only 'name'"),
        (
            pl.DataFrame({"id": [1], "x": [2**100]}, schema={"id": pl.Int64, "x": pl.Int128}),
            "cast it or drop it",
        ),
        (pl.DataFrame({"id": [1], "x": pl.Series([object()], dtype=pl.Object)}), "cast it or drop it"),
        (pl.DataFrame({"id": [1], "domain": [3]}), "'domain' was String and is now Int64"),
    ],
)
def test_metadata_that_cannot_be_kept_is_refused(frame: Any, says: str) -> None:
    writer = RunWriter(None, ["t"])
    writer.add_metadata(pl.DataFrame({"id": [1], "domain": ["x"]}))
    with pytest.raises(InputError) as raised:
        writer.add_metadata(frame)
    assert says in str(raised.value)
    assert writer.ledger.metadata().rows() == [(1, "x")]


def test_columns_that_cannot_be_grouped_are_named() -> None:
    writer = RunWriter(None, ["t"])
    writer.add_values(0, 0, [1], np.ones((1, 1)))
    writer.add_metadata(pl.DataFrame({"id": [1], "mean": [1], "tags": [["a"]]}))
    with pytest.raises(InputError, match="'mean' has the name of a result"):
        writer.ledger.by("mean")
    with pytest.raises(InputError, match=r"'tags' has type List\(String\)"):
        writer.ledger.by("tags")


def test_side_tables_are_replaced_as_a_whole(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    for loss in ([1.0], [1.0, 0.5], [1.0, 0.5, 0.25]):
        writer.add_table("loss-curve", pl.DataFrame({"loss": loss}))
        assert writer.ledger.table("loss-curve")["loss"].to_list() == loss
        writer.flush()
        assert open_ledger(tmp_path / "run").table("loss-curve")["loss"].to_list() == loss
    assert len(list((tmp_path / "run" / "tables").iterdir())) == 1
    assert open_ledger(tmp_path / "run").tables == ["loss-curve"]


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", "/etc/x", ".", "a.b", "A", "a\n", "x" * 65, "-a", None, 3]
)
def test_table_names_lead_nowhere_else(name: Any, tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", ["t"])
    with pytest.raises(InputError, match="table name"):
        writer.add_table(name, pl.DataFrame({"x": [1]}))


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("code", "not the single string 'code'"),
        (["a", "a"], "'a' is named twice"),
        ([""], "is no name"),
        ([1], "is no name"),
    ],
)
def test_targets_are_checked(targets: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        RunWriter(None, targets)


def test_target_names_may_be_any_text(tmp_path: Path) -> None:
    names = ["id", "step", "a:b/c\n", "日本", "value"]
    writer = RunWriter(tmp_path / "run", names)
    writer.add_values(0, 0, [1], np.arange(5.0)[None])
    writer.close()
    ledger = open_ledger(tmp_path / "run")
    assert [ledger.values(name)["value"].item() for name in names] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("shape", "ids"), [((2, 3), 2), ((3, 2), 2), ((2,), 2), ((0, 2), 1)])
def test_values_of_the_wrong_shape_are_refused(shape: tuple[int, ...], ids: int) -> None:
    writer = RunWriter(None, ["a", "b"])
    with pytest.raises(InputError, match=r"values of shape .* ids and 2 targets"):
        writer.add_values(0, 0, list(range(ids)), np.zeros(shape))
    assert writer.ledger.steps("a").is_empty()


def test_account_rows_are_checked() -> None:
    writer = RunWriter(None, ["a"])
    with pytest.raises(InputError, match="no target 'b': this run's are 'a'"):
        writer.add_account(0, "b", 0, 0, 0, 0, 0)
    with pytest.raises(InputError, match="no status 'fine': use one of 'ok', 'nan', 'skipped'"):
        writer.add_account(0, "a", 0, 0, 0, 0, 0, status="fine")
    assert writer.ledger.account().is_empty()


def test_info_is_merged_and_must_be_json(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", ["t"], info={"a": 1, "b": (1, 2)})
    writer.update_info({"a": 2, "c": {"d": NAN}})
    for ledger in (writer.ledger, open_ledger(tmp_path / "run")):
        assert ledger.info["a"] == 2
        assert ledger.info["b"] == [1, 2]
        assert math.isnan(ledger.info["c"]["d"])
    with pytest.raises(InputError, match=r"info\['f'\] is not JSON"):
        writer.update_info({"f": print})
    with pytest.raises(InputError, match="must be a dict"):
        writer.update_info([])  # type: ignore[arg-type]
    assert "f" not in writer.ledger.info


def test_a_closed_writer_records_nothing_more_and_closes_again(tmp_path: Path) -> None:
    writer = small(tmp_path / "run")
    writer.close()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    writer.close()
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    for add in (
        lambda: writer.add_values(2, 0, ["a"], np.zeros((1, 2))),
        lambda: writer.add_account(0, "code", 0, 0, 0, 0, 0),
        lambda: writer.add_metadata(pl.DataFrame({"id": ["a"]})),
        lambda: writer.add_table("t", pl.DataFrame()),
        lambda: writer.update_info({}),
    ):
        with pytest.raises(StoreError, match="this run is closed"):
            add()
    assert writer.ledger.values("code").equals(open_ledger(tmp_path / "run").values("code"))


def test_a_ledger_from_a_writer_sees_what_comes_later() -> None:
    writer = small()
    ledger = writer.ledger
    writer.add_values(2, 0, ["new"], np.full((1, 2), 100.0))
    assert ledger.values("code")["id"][0] == "new"
