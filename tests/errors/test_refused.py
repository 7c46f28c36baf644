"""Bad settings, one at a time: what is tried → how. Each is refused in one line that says what to do."""

# mypy: allow-untyped-calls
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from errors.training import LOSS, Training
from torch import nn

import assay
from assay.acting.credit import credit
from assay.acting.select import select
from assay.evaluate.functional import check_functional
from assay.evaluate.lds import linear_datamodeling_score
from assay.evaluate.shapley import monte_carlo_shapley, shapley_values
from assay.evaluate.subsets import SubsetTraining, draw_subsets
from assay.index.average import average_influence
from assay.methods.influence import InfluenceFunction
from assay.optimizers.select import model_of
from assay.plan.shape import shape_of
from assay.rows.share import Share
from assay.snapshots import Snapshots, snapshot_settings
from assay.workers import Local

LINEAR = nn.Linear(3, 2)
OTHER = nn.Linear(3, 2)


def loss(model: nn.Module, x: Any) -> Any:
    return model(x).square().mean()


TARGET = assay.Target([torch.randn(2, 3)], loss)


def shapley(**options: Any) -> None:
    assay.InRunShapley({"held out": TARGET}, **options)


def embedding(**options: Any) -> None:
    assay.DataValueEmbedding(**options)


def run(model: Any = LINEAR, methods: Any = None, **options: Any) -> None:
    optimizer = torch.optim.SGD(LINEAR.parameters(), lr=0.1)
    assay.Run(
        model,
        optimizer,
        methods=[assay.InRunShapley({"t": TARGET})] if methods is None else methods,
        **options,
    )


def weighted(weights: Any) -> None:
    training = Training()
    ids, _ = training.data[0][0]
    with training.run.step(ids, weights):
        pass


def stepped() -> assay.Ledger:
    training = Training()
    training.step()
    return training.close()


def frozen() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    assay.Run(model, torch.optim.SGD(model.parameters(), lr=0.1), methods=[assay.InRunShapley({"t": TARGET})])


def state_between_backward_and_step() -> None:
    training = Training()
    ids, batch = training.data[0][0]
    with training.run.step(ids):
        LOSS(training.model, batch).backward()
    training.run.state_dict()


REFUSED: dict[str, Callable[[], object]] = {
    # the method of the values
    "InRunShapley without a target": lambda: assay.InRunShapley({}),
    "InRunShapley with a function as its target": lambda: assay.InRunShapley({"t": loss}),  # type: ignore[dict-item]
    "InRunShapley(path='middle')": lambda: shapley(path="middle"),
    "values by token with momentum shared out": lambda: shapley(granularity="token", momentum="sketch"),
    "a tolerance for path='left'": lambda: shapley(tolerance=0.1),
    "a tolerance of 0": lambda: shapley(path="simpson", tolerance=0.0),
    "two points of quadrature": lambda: shapley(path="simpson", max_points=2),
    "a band of shares that leaves out 1": lambda: shapley(band=(1.1, 1.2)),
    "memory='reduced' for path='left'": lambda: shapley(memory="reduced"),
    "memory='recompute' with momentum shared out": lambda: shapley(memory="recompute", momentum="exact"),
    "GradientNorms with a function as its target": lambda: assay.GradientNorms({"t": loss}),  # type: ignore[dict-item]
    "GradientNorms at every 0th step": lambda: assay.GradientNorms(every=0),
    # embeddings
    "DataValueEmbedding(curvature='hessian')": lambda: embedding(curvature="hessian"),
    "DataValueEmbedding(dtype='fp8')": lambda: embedding(dtype="fp8"),
    "DataValueEmbedding(draws=0)": lambda: embedding(draws=0),
    "DataValueEmbedding(queue=0)": lambda: embedding(queue=0),
    "axes for a random projection": lambda: embedding(axes=TARGET),
    "a budget without a projection": lambda: embedding(budget=9, projection=assay.Projection(None, "none")),
    "Projection(kind='sparse')": lambda: assay.Projection(kind="sparse"),  # type: ignore[arg-type]
    "a random projection without a rank": lambda: assay.Projection(rank=None),
    "Projection(rank=0)": lambda: assay.Projection(rank=0),
    # the run
    "a run without a method": lambda: run(methods=[]),
    "a run with the same method twice": lambda: run(methods=[assay.InRunShapley({"t": TARGET})] * 2),
    "Run(check='always')": lambda: run(check="always"),
    "Run(on_error='ignore')": lambda: run(on_error="ignore"),
    "a function in place of the model": lambda: run(model=loss),
    "a model in DataParallel": lambda: run(model=nn.DataParallel(LINEAR)),
    "a model without a trainable parameter": frozen,
    "an optimizer of another model": lambda: run(model=OTHER),
    "an excluded parameter that is not there": lambda: run(exclude=["head.*"]),
    "a run in memory that is to be resumed": lambda: run(resume=True),
    "two weights for four ids": lambda: weighted([1.0, 1.0]),
    "a negative weight of a sample": lambda: weighted([1.0, -1.0, 1.0, 1.0]),
    "the state of a run between backward() and step()": state_between_backward_and_step,
    "Run(snapshots='often')": lambda: snapshot_settings("often"),
    "Snapshots(every=0)": lambda: Snapshots(every=0),
    "a list in place of the optimizer": lambda: model_of([1, 2]),  # type: ignore[arg-type]
    "a plan for a model without a linear layer": lambda: shape_of(nn.ReLU()),
    "a target without a batch": lambda: assay.Target([], loss),
    "a target whose loss is no function": lambda: assay.Target([1], "loss"),  # type: ignore[arg-type]
    # what is done with values
    "an interval of level 95": lambda: credit(stepped(), "domain", level=95),
    "a selection that says neither drop nor keep": lambda: select(stepped()),
    "a damping below 0": lambda: InfluenceFunction([], None, -0.1),
    "influence averaged over no checkpoint": lambda: average_influence([], [], loss),
    "an adjoint of a run without snapshots": lambda: stepped().adjoint(LINEAR, None, None, loss, []),  # type: ignore[arg-type]
    "norms of a run that recorded none": lambda: stepped().norms(),
    "embeddings of a run that recorded none": lambda: stepped().embeddings(),
    "a target that the run does not have": lambda: stepped().values("other"),
    # evaluation
    "an optimizer that cannot be stepped functionally": lambda: check_functional(
        torch.optim.Adagrad(LINEAR.parameters())
    ),
    "exact Shapley values of 40 players": lambda: shapley_values(lambda mask: mask.sum(), 40),  # type: ignore[arg-type,return-value]
    "Monte-Carlo Shapley values of one permutation": lambda: monte_carlo_shapley(
        lambda mask: mask.sum(), 3, permutations=1  # type: ignore[arg-type,return-value]
    ),
    "subsets of which each keeps everything": lambda: draw_subsets(4, 2, fraction=1.0),
    "retraining for no epoch": lambda: SubsetTraining(lambda p: torch.optim.SGD(p, lr=0.1), epochs=0, batch=2),
    "a datamodeling score of matrices that do not fit": lambda: linear_datamodeling_score(
        torch.ones(1, 2), torch.ones(2, 3), torch.ones(1, 2)
    ),
    "no process to work": lambda: Local(0),
    "part 4 of 4, counted from 0": lambda: Share(4, 4),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tried", REFUSED)
def test_refused(tried: str) -> None:
    with pytest.raises(assay.AssayError) as error:
        REFUSED[tried]()
    message = str(error.value)
    assert "\n" not in message
    assert re.search(r"\w", message)
    assert 20 < len(message) < 400
