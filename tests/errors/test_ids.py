"""Ids that cannot be used, and that nothing recorded before them is lost."""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import pytest
import torch
from errors.training import Training, is_whole, one_line

import assay


@pytest.mark.parametrize("ids", [[1, 2, 3], [1, 2, 3, 4, 5], [], [9]], ids=str)
def test_ids_of_the_wrong_length(ids: list[Any]) -> None:
    """The error says how many ids came and how many samples; the weights and the values of before stand."""
    training = Training()
    training.step()
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(assay.InputError, match=r"\bids?\b") as error:
        training.step(ids=ids)
    message = one_line(error)
    assert not ids or (str(len(ids)) in message and "4" in message)
    assert all(map(torch.equal, before, training.model.parameters()))
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=2)


@pytest.mark.parametrize(
    "ids",
    [[1.5, 2.5, 3.5, 4.5], [None] * 4, [[1], [2], [3], [4]], [1, 2, "three", 4], 7, "abcd", [2**70] * 4],
)
def test_ids_that_are_no_ids(ids: Any) -> None:
    training = Training()
    training.step()
    with pytest.raises(assay.InputError, match=r"\bids?\b") as error:
        training.step(ids=ids)
    one_line(error)
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=2)


def test_kind_of_ids_changes() -> None:
    training = Training()
    training.step()
    with pytest.raises(assay.InputError, match=r"\bids?\b") as error:
        training.step(ids=["a", "b", "c", "d"])
    one_line(error)
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=2)
