"""Where the Gauss-Newton matrix is the Hessian (softmax regression), embeddings are the true derivative of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from tests.embedding.runs import CLASSES, OPTIMIZERS, data, loss_fn, order


def train(optimizer: str, moved: tuple[int, int] | None, by: float, record: bool = False) -> tuple[Any, Any]:
    """The model after all steps, the term of one (step, row) multiplied by 1 − `by`."""
    torch.manual_seed(3)
    model = nn.Linear(4, CLASSES).double()
    opt = OPTIMIZERS[optimizer](model.parameters())
    run = None
    if record:
        method = assay.DataValueEmbedding(
            assay.Projection(kind="none"), curvature="ggn", draws="all", dtype="fp64"
        )
        run = assay.Run(model, opt, methods=[method])
    x, y = data()
    for t, ids in enumerate(order()):
        terms = torch.ones(len(ids), dtype=torch.float64)
        if moved is not None and moved[0] == t:
            terms[moved[1]] = 1 - by
        if run is not None:
            with run.step(ids):
                loss_fn(model, (x[ids], y[ids])).backward()
        else:
            (terms * F.cross_entropy(model(x[ids]), y[ids], reduction="none")).mean().backward()
        opt.step()
        opt.zero_grad()
    if run is not None:
        run.close()
    return model, run


@pytest.mark.parametrize("optimizer", ["sgd", "decayed", "momentum", "nesterov"])
def test_embeddings_are_the_derivative_of_training(optimizer: str) -> None:
    x, y = data()
    model, run = train(optimizer, None, 0.0, record=True)
    query = (x[20:], y[20:])
    scores = run.ledger.embeddings(segments=3, curvature="ggn", blocks="all").influence(
        model, [query], loss_fn
    )
    mean = scores.mean(0)  # of the loss over all four queries

    def changed(step: int, row: int, by: float) -> float:
        return float(loss_fn(train(optimizer, (step, row), by)[0], query).detach())

    rows = [(t, r) for t, ids in enumerate(order()) for r in range(len(ids))]
    for place in (0, 5, 14, 22, len(rows) - 1):
        slope = (changed(*rows[place], 1e-4) - changed(*rows[place], -1e-4)) / 2e-4
        torch.testing.assert_close(float(mean[place]), slope, rtol=1e-5, atol=1e-9)


def test_adamw_misses_only_what_the_second_moment_does() -> None:
    """With the preconditioner of every step held fixed in training, the derivative is exact up to its drift."""
    x, y = data()
    model, run = train("adamw", None, 0.0, record=True)
    query = (x[20:], y[20:])
    scores = run.ledger.embeddings(curvature="ggn", blocks="all").influence(model, [query], loss_fn).mean(0)
    without = run.ledger.embeddings(curvature="ggn", blocks="all", momentum=False)
    other = without.influence(model, [query], loss_fn).mean(0)
    rows = [(t, r) for t, ids in enumerate(order()) for r in range(len(ids))]

    def slope(step: int, row: int) -> float:
        up, down = (float(loss_fn(train("adamw", (step, row), e)[0], query).detach()) for e in (1e-4, -1e-4))
        return (up - down) / 2e-4

    places = list(range(12, len(rows), 2))  # after the first steps, whose second moment is all one batch
    truth = torch.tensor([slope(*rows[n]) for n in places], dtype=torch.float64)

    def correlation(found: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([found[places], truth]))[0, 1])

    assert correlation(scores) > 0.8
    assert correlation(scores) > correlation(other)
