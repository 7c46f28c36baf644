"""Algorithms 1 and 2 against explicit products of transition matrices, in float64."""

from __future__ import annotations

import pytest
import torch

import assay
from tests.embedding.runs import CLASSES, OPTIMIZERS, STEPS, data, dense_embeddings, loss_fn, record, recorded

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("blocks", ["layer", "all"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recursion_is_the_explicit_product(optimizer: str, blocks: str) -> None:
    _, run = record(optimizer, clip=0.5)
    found = run.ledger.embeddings(blocks=blocks)
    expected = dense_embeddings(recorded(run), "fisher", blocks, momentum=True)
    torch.testing.assert_close(found.export(), expected, **EXACT)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_recursion_with_a_support(optimizer: str) -> None:
    model, run = record(optimizer, projection=assay.Projection(rank=2, support=3))
    found = run.ledger.embeddings(segments=3)
    expected = dense_embeddings(recorded(run), "fisher", "layer", momentum=True)
    torch.testing.assert_close(found.export(), expected, **EXACT)
    x, y = data()
    queries = [(x[:3], y[:3])]
    projected = found.project(model, queries, loss_fn)
    torch.testing.assert_close(found.influence(model, queries, loss_fn), projected @ expected.t(), **EXACT)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gauss_newton(optimizer: str) -> None:
    _, run = record(optimizer, curvature="ggn", draws="all")
    found = run.ledger.embeddings(curvature="ggn", blocks="all")
    assert recorded(run).header.draws == CLASSES
    expected = dense_embeddings(recorded(run), "ggn", "all", momentum=True)
    torch.testing.assert_close(found.export(), expected, **EXACT)
    plain = run.ledger.embeddings(blocks="all").export()
    assert (plain - expected).abs().max() > 1e-4  # the two curvatures differ


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("segments", range(1, STEPS + 1))
def test_any_number_of_segments_gives_the_same(segments: int, momentum: bool) -> None:
    model, run = record("adamw")
    x, y = data()
    whole = run.ledger.embeddings(momentum=momentum)
    cut = run.ledger.embeddings(segments=segments, momentum=momentum)
    torch.testing.assert_close(cut.export(), whole.export(), **EXACT)
    queries = [(x[:3], y[:3]), (x[3:5], y[3:5])]
    scores = cut.influence(model, queries, loss_fn)
    torch.testing.assert_close(scores, whole.influence(model, queries, loss_fn), **EXACT)
    expected = dense_embeddings(recorded(run), "fisher", "layer", momentum)
    torch.testing.assert_close(whole.export(), expected, **EXACT)
    projected = cut.project(model, queries, loss_fn)
    torch.testing.assert_close(scores, projected @ expected.t(), **EXACT)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_intermediate_checkpoints_see_what_came_before(optimizer: str) -> None:
    """The influence on the weights after step t is that of a run that ended there."""
    model, run = record(optimizer)
    x, y = data()
    cut = run.ledger.embeddings(segments=3)
    at = cut.checkpoints[1]
    found = recorded(run)
    scores = cut.influence(model, [(x[:2], y[:2])], loss_fn, at_step=at)
    rows = found.steps[at].stop
    assert 0 < rows < len(cut)
    found.steps = found.steps[: at + 1]
    expected = (
        cut.project(model, [(x[:2], y[:2])], loss_fn) @ dense_embeddings(found, "fisher", "layer", True).t()
    )
    torch.testing.assert_close(scores[:, :rows], expected, **EXACT)
    assert not scores[:, rows:].any()


def test_all_epoch_removal_sums_over_the_steps_of_an_id() -> None:
    model, run = record("sgd")
    x, y = data()
    found = run.ledger.embeddings()
    rows = found.influence(model, [(x, y)], loss_fn)
    ids = found.influence(model, [(x, y)], loss_fn, by="id")
    for n, own in enumerate(found.ids):
        where = torch.tensor([i == own for i in found.rows["id"]])
        torch.testing.assert_close(ids[:, n], rows[:, where].sum(1))


def test_workers_give_the_same(tmp_path: object) -> None:
    _, run = record("momentum", out=f"{tmp_path}/run")
    one = run.ledger.embeddings(segments=2).export()
    record("momentum", out=f"{tmp_path}/again")
    two = assay.open(f"{tmp_path}/again").embeddings(segments=2, workers=2).export()
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_file_holds_what_memory_holds(tmp_path: object) -> None:
    _, run = record("sgd")
    found = run.ledger.embeddings(segments=2)
    torch.testing.assert_close(found.export(f"{tmp_path}/e.npy"), found.export())
