"""Every baseline against its definition, written out slowly."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import InputError
from assay.evaluate.baselines import (
    BM25,
    Adjoint,
    Cosine,
    DotProduct,
    Embeddings,
    FeatureSimilarity,
    FinalLoss,
    GradientNorm,
    Influence,
    InRun,
    KNNShapley,
    Random,
    RetrainingShapley,
    Scorer,
    TracIn,
    Trak,
    score,
    unavailable,
)
from assay.evaluate.baselines.knn import knn_shapley
from assay.evaluate.shapley import shapley_values
from assay.evaluate.subsets import SubsetTraining, train_on_subsets
from assay.evaluate.task import SubsetLoop, Task

N, Q, CLASSES = 24, 5, 3
Rows = tuple[Tensor, Tensor]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def losses(model: nn.Module, rows: Rows) -> Tensor:
    return F.cross_entropy(model(rows[0]), rows[1], reduction="none")


def features(model: nn.Sequential, rows: Rows) -> Tensor:
    return torch.tanh(model[0](rows[0]))


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def data(n: int, seed: int) -> Rows:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    return x, x[:, :CLASSES].argmax(1)


TRAINING = SubsetTraining(sgd, epochs=4, batch=6)


@pytest.fixture(scope="module")
def task() -> Task:
    x, q = data(N, 1), data(Q, 2)
    return Task(
        losses, x, q, SubsetLoop(make_model, losses, x, TRAINING), features=features, labels=(x[1], q[1])
    )


def together(task: Task) -> Task:
    return Task(
        task.losses, task.data, task.queries, task.loop, together=True, features=task.features, labels=task.labels
    )  # fmt: skip


def gradient(model: nn.Module, rows: Rows, i: int) -> Tensor:
    loss = losses(model, (rows[0][i : i + 1], rows[1][i : i + 1]))[0]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def all_gradients(model: nn.Module, rows: Rows) -> Tensor:
    return torch.stack([gradient(model, rows, i) for i in range(len(rows[0]))])


def test_the_watched_training_is_the_one_that_is_repeated(task: Task) -> None:
    everything = torch.ones(1, N, dtype=torch.bool)
    truth = train_on_subsets(make_model, losses, task.data, everything, TRAINING, seed=0)
    for watched in (task.trained, task.loop.train([], snapshots="auto")):
        for name, w in watched.model.state_dict().items():
            torch.testing.assert_close(w, truth[name][0], rtol=1e-12, atol=1e-12)
    assert len(task.trained.checkpoints) == TRAINING.epochs
    rates = [c.rate for c in task.trained.checkpoints]
    assert all(a > b > 0 for a, b in pairwise(rates))
    torch.testing.assert_close(sum(rates), 4 * 0.1 * (1 + 1 / 16) / 2)  # linear from 0.1 to 0.1 / 16


def test_dot_products_and_their_kin(task: Task) -> None:
    model = task.trained.model
    x, q = all_gradients(model, task.data), all_gradients(model, task.queries)
    torch.testing.assert_close(DotProduct().scores(task), q @ x.t())
    torch.testing.assert_close(Cosine().scores(task), F.normalize(q) @ F.normalize(x).t())
    torch.testing.assert_close(GradientNorm().scores(task)[0], -x.norm(dim=1))
    torch.testing.assert_close(FinalLoss().scores(task)[0], -losses(model, task.data))
    torch.testing.assert_close(DotProduct().scores(together(task)), (q @ x.t()).mean(0, keepdim=True))


def test_tracin_sums_over_checkpoints(task: Task) -> None:
    model = make_model()
    truth = torch.zeros(Q, N, dtype=torch.float64)
    for k in (1, 3):
        point = task.trained.checkpoints[k]
        model.load_state_dict(point.weights)
        truth += point.rate * all_gradients(model, task.queries) @ all_gradients(model, task.data).t()
    torch.testing.assert_close(TracIn(checkpoints=2).scores(task), truth)


@pytest.mark.parametrize("neighbours", [1, 2, 3, 8])
def test_knn_shapley_is_the_shapley_value_of_the_classifier(neighbours: int) -> None:
    (x, y), (q, asked) = data(7, 3), data(3, 4)
    found = knn_shapley(x, y, q, asked, neighbours)
    distance = torch.cdist(q, x)

    def utility(mask: Tensor) -> Tensor:
        worth = torch.zeros(3, dtype=torch.float64)
        for k in range(3):
            members = mask.nonzero().flatten()
            nearest = members[distance[k, members].argsort()][:neighbours]
            worth[k] = (y[nearest] == asked[k]).sum() / neighbours
        return worth

    torch.testing.assert_close(found.t(), shapley_values(utility, 7))


def test_trak_is_its_definition(task: Task) -> None:
    from trak.projectors import BasicProjector, ProjectionType

    model = task.trained.model

    def odds(rows: Rows) -> tuple[Tensor, Tensor]:
        grads, q = [], []
        for i in range(len(rows[0])):
            loss = losses(model, (rows[0][i : i + 1], rows[1][i : i + 1]))[0]
            p = (-loss).exp()
            found = torch.autograd.grad((p / (1 - p)).log(), list(model.parameters()))
            grads.append(torch.cat([g.flatten() for g in found]))
            q.append(1 - p.detach())
        return torch.stack(grads), torch.stack(q)

    x, wrong = odds(task.data)
    asked, _ = odds(task.queries)
    projector = BasicProjector(x.shape[1], 8, 0, ProjectionType.rademacher, torch.device("cpu"), block_size=2)
    matrix = projector.project(torch.eye(x.shape[1]), 0).double()
    phi, asked = x @ matrix, asked @ matrix
    truth = asked @ torch.linalg.inv(phi.t() @ phi) @ phi.t() * wrong
    found = Trak(dimension=8).scores(task).double()
    scale = (found * truth).sum() / truth.square().sum()  # the library's unit is its own
    torch.testing.assert_close(found, scale * truth, rtol=1e-2, atol=1e-3 * float(found.abs().max()))


def test_bm25_finds_rare_words() -> None:
    examples = ["the cat sat", "the dog sat", "the dog ran far"]
    rows = torch.zeros(3), torch.zeros(2)
    words = Task(losses, *rows, loop=None, texts=(examples, ["ran", "cat dog the"]))  # type: ignore[arg-type]
    found = BM25().scores(words)
    assert found[0].argmax() == 2
    assert found[0, :2].eq(0).all()
    assert found[1, 0] > found[1, 1] > found[1, 2]  # cat is rarer than dog; a longer text counts less


METHODS: list[Scorer] = [
    Random(), FinalLoss(), GradientNorm(), DotProduct(), Cosine(), TracIn(2), Trak(16), KNNShapley(2),
    KNNShapley(2, features=True), FeatureSimilarity(), RetrainingShapley(2, stride=12), InRun("left"),
    InRun("trapezoid"), InRun("hessian"), InRun("left", even=True),
    Embeddings("fisher", 4), Embeddings("ggn", 4), Influence("logra", 3),
    Influence("ekfac"), Adjoint("hessian"), Adjoint("ggn"),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_one_interface_for_all(task: Task, method: Scorer) -> None:
    assert unavailable(method, task) is None
    for asked, rows in ((task, Q), (together(task), 1)):
        found = score(method, asked)
        assert found.values.shape in ((rows, N), (1, N))
        assert found.seconds > 0


def test_settings_other_than_usual_stand_in_the_name() -> None:
    usual = [
        Influence(),
        Influence("ekfac"),
        Embeddings(),
        Embeddings("ggn"),
        KNNShapley(),
        KNNShapley(features=True),
    ]
    assert [method.name for method in usual] == [
        "LoGra", "EKFAC", "embeddings, fisher", "embeddings, ggn", "KNN-Shapley", "KNN-Shapley, features",
    ]  # fmt: skip
    assert Influence(rank=32, damping=1.0, normalize="relatif").name == "LoGra, relatif, rank 32, damping 1"
    assert Influence("ekfac", 8, 1e-3).name == "EKFAC, damping 0.001"  # which has no rank
    assert Embeddings("ggn", 8, "all").name == "embeddings, ggn, rank 8, blocks all"
    assert KNNShapley(7).name == "KNN-Shapley, 7 neighbours"


def test_adjoint_is_leaving_out(task: Task) -> None:
    """All steps of an example at once: first order, so in ranks."""
    from assay.evaluate import leave_out, occurrences, rank_correlation
    from assay.evaluate.tsloo import Training

    watched = task.loop.train([], snapshots="auto")
    order = [ids for ((ids, _),) in map(watched.batches_of_step, range(16))]
    torch.manual_seed(0)
    model = make_model()
    run = Training(
        model, sgd(model.parameters()), [[batch for _, batch in watched.batches_of_step(t)] for t in range(16)],
        lambda m, b: losses(m, b) / len(b[1]), rates=lambda t: [0.1 * TRAINING.rate(t, N)],
    )  # fmt: skip
    removals = [occurrences(order, [i], range(16)) for i in range(N)]
    truth = leave_out(run, removals, task.question_batches(), task.loss_fn)
    assert rank_correlation(Adjoint().scores(task), truth).min() > 0.95
    assert rank_correlation(InRun("trapezoid").scores(task), truth).mean() > 0.5


def test_what_a_method_cannot_do_is_said(task: Task) -> None:
    assert unavailable(BM25(), task) == "it reads texts, and the task has none"
    bare = Task(losses, task.data, task.queries, task.loop)
    assert unavailable(KNNShapley(), bare) == "it needs classes, and the task has none"
    assert unavailable(FeatureSimilarity(), bare) == "the task has no features"
    with pytest.raises(InputError, match="reads texts"):
        BM25().scores(task)
    with pytest.raises(InputError, match="needs classes"):
        KNNShapley().scores(bare)

    class Broken:
        name = "broken"

        def scores(self, task: Task) -> Tensor:
            return torch.full((1, N), torch.nan)

    with pytest.raises(InputError, match="broken: 24 of its scores are not finite"):
        score(Broken(), task)

    class Transposed(Broken):
        def scores(self, task: Task) -> Tensor:
            return torch.zeros(N, Q)

    with pytest.raises(InputError, match=r"scores of shape \[24, 5\]"):
        score(Transposed(), task)
