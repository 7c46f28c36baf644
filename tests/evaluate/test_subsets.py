"""Retraining on subsets against plain loops, and the linear datamodeling score against its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import InputError, StoreError
from assay.evaluate.subsets import (
    SubsetTraining,
    SubsetTruth,
    draw_subsets,
    evaluate,
    retrained_losses,
    subset_truth,
    train_on_subsets,
)
from assay.rows import Folder

N, Q = 17, 4


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


SGD = SubsetTraining(sgd, epochs=3, batch=5)
ADAMW = SubsetTraining(adamw, epochs=3, batch=5, decay=False)


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def losses(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(rows[0]), rows[1], reduction="none")


def one_by_one(
    kept: Tensor, training: SubsetTraining, seed: int, make: Callable[[], nn.Module] = make_model
) -> list[nn.Module]:
    """Each model alone, its minibatches without the rows that it leaves out, by torch's own optimizer."""
    x, y = data(N, 1)
    models = []
    for own in kept:
        torch.manual_seed(seed)
        model = make()
        orders = [torch.randperm(N) for _ in range(training.epochs)]
        optimizer = training.optimizer(model.parameters())
        rate = optimizer.param_groups[0]["lr"]
        steps, done = training.epochs * -(-N // training.batch), 0
        for order in orders:
            for rows in torch.split(order, training.batch):
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - done / steps if training.decay else 1)
                rows = rows[own[rows]]
                optimizer.zero_grad()
                (losses(model, (x[rows], y[rows])).sum() / max(len(rows), 1)).backward()
                optimizer.step()
                done += 1
        models.append(model)
    return models


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_retraining_together_is_retraining_one_by_one(training: SubsetTraining) -> None:
    kept = draw_subsets(N, 6, fraction=0.4, seed=3)
    kept[0] = False
    kept[0, :2] = True  # minibatches without any row
    found = train_on_subsets(make_model, losses, data(N, 1), kept, training, seed=7)
    models = one_by_one(kept, training, seed=7)
    for name, weights in found.items():
        truth = torch.stack([model.get_parameter(name).detach() for model in models])
        assert (weights - truth).abs().max() <= 1e-10 * truth.abs().max()
    asked = evaluate(make_model(), found, losses, data(Q, 2))
    truth = torch.stack([losses(model, data(Q, 2)).detach() for model in models])
    torch.testing.assert_close(asked, truth, rtol=1e-9, atol=1e-12)


class Drawn(nn.Module):
    """Numbers drawn at random beside the parameters, as a buffer and not, and a batch norm that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(6, 8, dtype=torch.float64))
        self.shift = torch.randn(8, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(8).double().eval()
        self.norm.get_buffer("running_mean").normal_()
        self.norm.get_buffer("running_var").uniform_(0.5, 2)
        self.last = nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm(torch.sin(x @ self.matrix + self.shift)))
        return found


def test_models_are_asked_with_the_buffers_of_their_training() -> None:
    kept = draw_subsets(N, 3)
    models = one_by_one(kept, SGD, 5, Drawn)
    truth = torch.stack([losses(model, data(Q, 2)).detach() for model in models])
    found = retrained_losses(Drawn, losses, data(N, 1), data(Q, 2), SGD, kept=kept, seeds=[5])
    torch.testing.assert_close(found[0], truth, rtol=1e-9, atol=1e-12)


def test_random_numbers_go_on_as_if_nothing_was_drawn(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for cache in (None, tmp_path):
        retrained_losses(Drawn, losses, data(N, 1), data(Q, 2), SGD, kept=draw_subsets(N, 2), cache=cache)
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False).eval()],
    ids=["in training", "no running statistics"],
)
def test_statistics_of_whole_minibatches_are_refused(norm: nn.Module) -> None:
    with pytest.raises(InputError, match=r"0 \(BatchNorm1d\) takes its statistics from whole minibatches"):
        train_on_subsets(
            lambda: nn.Sequential(norm, make_model()).double(), losses, data(N, 1), draw_subsets(N, 2), SGD
        )


def truth_of(
    cache: Path | None, seeds: tuple[int, ...] = (0, 1), calls: list[int] | None = None
) -> SubsetTruth:
    def progress(done: int, total: int) -> None:
        assert total == 7 * len(seeds)
        if calls is not None:
            calls.append(done)

    kept = draw_subsets(N, 7)
    return subset_truth(
        make_model, losses, data(N, 1), data(Q, 2), SGD,
        kept=kept, seeds=seeds, cache=cache, at_once=3, progress=progress,
    )  # fmt: skip


def test_the_truth_is_averaged_over_seeds() -> None:
    found = truth_of(None)
    truth = 0
    for seed in (0, 1):
        models = one_by_one(found.kept, SGD, seed)
        truth = truth + torch.stack([losses(model, data(Q, 2)).detach() for model in models]) / 2
    torch.testing.assert_close(found.losses, truth, rtol=1e-9, atol=1e-12)


def test_a_truth_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = truth_of(None)
    written = []
    write = Folder.write_json

    def some(self: Folder, name: str, fields: dict[str, object]) -> None:
        if len(written) == 6:  # the settings, two seeds, three blocks
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, fields)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_json", some)
        with pytest.raises(KeyboardInterrupt):
            truth_of(tmp_path)
    trained = []
    again = train_on_subsets

    def counted(*args: object) -> object:
        trained.append(args)
        return again(*args)  # type: ignore[arg-type]

    monkeypatch.setitem(subset_truth.__globals__, "train_on_subsets", counted)
    calls: list[int] = []
    found = truth_of(tmp_path, calls=calls)
    assert torch.equal(found.losses, whole.losses)
    assert len(trained) == 3  # of six blocks
    assert calls == [3, 6, 7, 10, 13, 14]
    with pytest.raises(StoreError, match="other data or settings"):
        subset_truth(make_model, losses, data(N, 5), data(Q, 2), SGD, kept=found.kept, cache=tmp_path)


def test_the_score_is_the_mean_rank_correlation() -> None:
    g = torch.Generator().manual_seed(0)
    kept = draw_subsets(N, 30)
    truth = SubsetTruth(kept, torch.randn(30, Q, generator=g).double())
    scores = torch.randn(Q, N, generator=g)
    found = truth.score(scores)
    for q in range(Q):
        sums = [float(scores[q, own].double().sum()) for own in kept]
        assert abs(float(found.per_query[q]) - spearmanr(sums, -truth.losses[:, q]).statistic) < 1e-12
    assert found.mean == pytest.approx(float(found.per_query.mean()))
    assert found.low < found.mean < found.high
    assert truth.score(scores).low == found.low


def test_the_right_answer_scores_one_and_no_answer_nothing() -> None:
    kept = draw_subsets(N, 50)
    worth = torch.randn(30, N, dtype=torch.float64)
    truth = SubsetTruth(kept, -(kept.double() @ worth.t()))
    assert truth.score(worth).mean > 1 - 1e-12
    assert truth.score(-worth).mean < -1 + 1e-12
    assert truth.score(torch.zeros(30, N)).mean == 0
    chance = truth.score(torch.randn(30, N))
    assert abs(chance.mean) < 0.15
    assert chance.low < 0.05


def test_refusals() -> None:
    truth = SubsetTruth(draw_subsets(N, 2), torch.zeros(2, Q))
    with pytest.raises(InputError, match="at least 3"):
        truth.score(torch.zeros(Q, N))
    with pytest.raises(InputError, match=r"values \[4, 3\]"):
        SubsetTruth(draw_subsets(N, 3), torch.zeros(3, Q)).score(torch.zeros(Q, 3))
    with pytest.raises(InputError, match="one loss per row"):
        train_on_subsets(make_model, lambda m, r: losses(m, r).mean(), data(N, 1), draw_subsets(N, 2), SGD)
    with pytest.raises(InputError, match="a column per example"):
        train_on_subsets(make_model, losses, data(N, 1), torch.ones(2, 3).bool(), SGD)
    with pytest.raises(InputError, match="keeps 0"):
        draw_subsets(N, 2, fraction=0.01)
    with pytest.raises(InputError, match="at least 1"):
        SubsetTraining(sgd, epochs=0)
