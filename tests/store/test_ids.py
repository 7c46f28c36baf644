"""Which ids a run takes, and what it says about the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from assay.errors import InputError
from assay.store import RunWriter


def record(ids: Any, writer: RunWriter | None = None) -> list[Any]:
    writer = writer or RunWriter(None, ["t"])
    writer.add_values(0, 0, ids, np.ones((len(ids), 1)))
    return writer.ledger.steps()["id"].to_list()


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([3, -1, 3], [3, -1, 3]),
        ((2**63 - 1, -(2**63)), [2**63 - 1, -(2**63)]),
        ([np.int32(4), 5, np.uint8(6)], [4, 5, 6]),
        (range(3), [0, 1, 2]),
        (np.array([1, 2], dtype=np.uint64), [1, 2]),
        (torch.tensor([7, 8]), [7, 8]),
        ([torch.tensor(7), torch.tensor(8)], [7, 8]),
        (["a", "", "日本 \n"], ["a", "", "日本 \n"]),
        (np.array(["x", "y"]), ["x", "y"]),
        ([np.str_("x")], ["x"]),
        (np.array(["x", "yy"], dtype=object), ["x", "yy"]),
        (pl.Series(["p"]), ["p"]),
        ([], []),
    ],
)
def test_ids_come_back_as_they_were_given(ids: Any, kept: list[Any]) -> None:
    assert record(ids) == kept


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([1, True], "position 1 of the ids holds True (bool)"),
        ([True], "position 0 of the ids holds True (bool)"),
        ([np.bool_(True)], "position 0 of the ids holds"),
        (np.array([True, False]), "position 0 of the ids holds True (bool)"),
        ([1.0], "position 0 of the ids holds 1.0 (float)"),
        (np.array([1.5]), "position 0 of the ids holds 1.5 (float)"),
        ([torch.tensor(1.5)], "position 0 of the ids holds"),
        ([1, "a"], "position 1 of the ids holds 'a' (str)"),
        (["a", 1], "position 1 of the ids holds 1 (int)"),
        (["a", None], "position 1 of the ids holds None (NoneType)"),
        ([b"a"], "position 0 of the ids holds b'a' (bytes)"),
        ([(1, 2)], "position 0 of the ids holds (1, 2) (tuple)"),
        ([2**63], "an id cannot be stored"),
        (["\ud800"], "an id cannot be stored"),
        ("abc", "not the single 'abc'"),
        (b"abc", "not the single b'abc'"),
        (np.zeros((2, 2), dtype=int), "ids of shape [2, 2]"),
        ({"a": 1}, "ids of shape []"),
    ],
)
def test_what_is_no_id_is_refused_in_one_line_and_nothing_is_recorded(ids: Any, says: str) -> None:
    writer = RunWriter(None, ["t"])
    with pytest.raises(InputError) as raised:
        record(ids, writer)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert writer.ledger.steps().is_empty()


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ([1], ["a"], "this run's ids are whole numbers, but 'a' is not"),
        (["a"], [1], "this run's ids are strings, but 1 is not"),
    ],
)
def test_a_run_keeps_to_one_kind_of_ids(first: list[Any], second: list[Any], says: str) -> None:
    writer = RunWriter(None, ["t"])
    record(first, writer)
    with pytest.raises(InputError, match=says):
        record(second, writer)
    with pytest.raises(InputError, match=says):
        writer.add_metadata(pl.DataFrame({"id": second}))
    assert writer.ledger.steps()["id"].to_list() == first


def test_the_metadata_may_decide_the_kind() -> None:
    writer = RunWriter(None, ["t"])
    writer.add_metadata(pl.DataFrame({"id": ["a"], "domain": ["law"]}))
    with pytest.raises(InputError, match="strings"):
        record([1], writer)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (pl.Series([1, None]), "no id in row 1"),
        (pl.Series([1.5]), "type Float64"),
        (pl.Series([True]), "type Boolean"),
        (pl.Series([2**63], dtype=pl.UInt64), "integers of 64 bits"),
    ],
)
def test_metadata_ids_are_checked(ids: pl.Series, says: str) -> None:
    writer = RunWriter(None, ["t"])
    with pytest.raises(InputError) as raised:
        writer.add_metadata(pl.DataFrame({"id": ids}))
    assert says in str(raised.value)
    assert writer.ledger.metadata().is_empty()


def test_metadata_ids_may_be_narrow_or_categorical() -> None:
    narrow, categorical = RunWriter(None, ["t"]), RunWriter(None, ["t"])
    narrow.add_metadata(pl.DataFrame({"id": pl.Series([1], dtype=pl.UInt8)}))
    categorical.add_metadata(pl.DataFrame({"id": pl.Series(["a"], dtype=pl.Categorical)}))
    assert narrow.ledger.metadata().schema["id"] == pl.Int64
    assert categorical.ledger.metadata().schema["id"] == pl.String


def test_the_caller_may_reuse_the_buffers() -> None:
    writer = RunWriter(None, ["t"])
    ids, values = np.array([1, 2]), np.array([[0.5], [0.25]])
    writer.add_values(0, 0, ids, values)
    ids[:], values[:] = 9, 9.0
    assert writer.ledger.steps().rows() == [(0, 1, 0.5), (0, 2, 0.25)]
