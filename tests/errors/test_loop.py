"""Loops that call things in another order, or stop in the middle."""

# mypy: allow-untyped-calls
from __future__ import annotations

from pathlib import Path

import pytest
from errors.training import LOSS, Training, is_whole, one_line

import assay


def test_step_without_backward() -> None:
    """The second `run.step` says that the first had no backward pass; the loop can go on after it."""
    training = Training()
    training.step()
    ids, batch = training.data[1][0]
    with pytest.raises(assay.AssayError, match="backward") as error:  # noqa: PT012
        with training.run.step(ids):
            LOSS(training.model, batch)
        with training.run.step(ids):
            LOSS(training.model, batch)
    one_line(error)
    training.taken = 1
    training.step()
    is_whole(training.close(), steps=2)


def test_two_backward_passes_in_one_step() -> None:
    """Both are in the gradient, so both are in the values."""
    twice, doubled = Training(), Training()
    ids, batch = twice.data[0][0]
    with twice.run.step(ids):
        loss = LOSS(twice.model, batch)
        loss.backward(retain_graph=True)
        loss.backward()
    twice.update()
    with doubled.run.step(ids):
        (2 * LOSS(doubled.model, batch)).backward()
    doubled.update()
    a, b = (t.close().steps("held_out")["value"].to_list() for t in (twice, doubled))
    assert a == pytest.approx(b, rel=1e-9)


def test_nested_step() -> None:
    training = Training()
    ids, _ = training.data[0][0]
    with (
        pytest.raises(assay.AssayError, match="step") as error,
        training.run.step(ids),
        training.run.step(ids),
    ):
        pass
    one_line(error)
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=1)


def test_error_of_the_users_own_code_passes_through() -> None:
    """An exception inside `run.step` is the user's; the next micro-batch starts afresh."""
    training = Training()
    training.step()
    ids, batch = training.data[1][0]
    with pytest.raises(RuntimeError, match="out of memory"), training.run.step(ids):  # noqa: PT012
        LOSS(training.model, batch)
        raise RuntimeError("out of memory")
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=2)


def test_step_after_close() -> None:
    training = Training()
    training.step()
    ledger = training.close()
    training.run.close()  # closing again does nothing
    with pytest.raises(assay.AssayError, match="close") as error:
        training.step()
    one_line(error)
    is_whole(ledger, steps=1)


def test_close_in_the_middle_of_a_step() -> None:
    """A micro-batch that no optimizer step followed moved nothing: the steps before it stand."""
    training = Training()
    training.step()
    ids, batch = training.data[1][0]
    with training.run.step(ids):
        LOSS(training.model, batch).backward()
    is_whole(training.close(), steps=1)


def test_run_is_a_context_manager_and_keeps_what_it_has(tmp_path: Path) -> None:
    """An error in the loop ends the run, whose values until then are on the disk."""
    training = Training(out=tmp_path / "run")
    with pytest.raises(ZeroDivisionError), training.run:  # noqa: PT012
        training.step()
        training.step()
        raise ZeroDivisionError
    is_whole(assay.open(tmp_path / "run"), steps=2)
