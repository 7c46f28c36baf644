"""Influence by layer and by position, over several checkpoints, and tuned: against explicit sums in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from index.test_index import (
    N,
    assert_close,
    batches,
    build,
    data,
    dense_rows,
    inverse,
    loss_fn,
    net,
    queries,
)
from reference import CASES
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import InputError
from assay.evaluate.subsets import SubsetTruth, draw_subsets
from assay.index import Index, average_influence
from assay.projection import Projection, random_sides


@pytest.mark.parametrize("normalize", [None, "relatif", "unit"])
def test_the_shares_of_the_layers_are_the_dense_ones(normalize: Any) -> None:
    model = net()
    index = build(model)
    found = index.influence(model, queries(), loss_fn, by="layer", normalize=normalize)
    assert found.shape == (5, N, len(index.layers))
    assert_close(found.sum(2), index.influence(model, queries(), loss_fn, normalize=normalize))
    if normalize is None:
        examples, asked = dense_rows(model, data(N, 1)), dense_rows(model, data(5, 2))
        for number, layer in enumerate(index.layers["layer"]):
            truth = asked[layer] @ inverse(examples[layer], 0.1) @ examples[layer].t()
            assert_close(found[:, :, number], truth)
    with pytest.raises(InputError, match="by='token'"):
        index.influence(model, queries(), loss_fn, by="token")  # type: ignore[arg-type]


class Bag(nn.Module):
    """Tokens through a table, a layer at every position, a layer on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.each = nn.Embedding(11, 6), nn.Linear(6, 5)
        self.last = nn.Linear(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.tanh(self.each(self.table(tokens))).mean(1))  # type: ignore[no-any-return]


def test_the_shares_of_positions_are_the_gradients_through_them() -> None:
    torch.manual_seed(0)
    model = Bag().double()
    tokens, labels = torch.randint(11, (7, 3)), torch.randint(4, (7,))
    projection = Projection(rank=4, seed=1)
    index = Index.build(model, [(range(7), (tokens, labels))], loss_fn, projection=projection, dtype="fp64")
    asked = tokens[:2].flip(1), labels[:2]
    found, rest = index.tokens(model, (tokens, labels), [asked], loss_fn)
    assert_close(found.sum(2) + rest, index.influence(model, [asked], loss_fn))
    directions = index._directions(model, [asked], loss_fn, 0.1, "fisher")
    for i in range(7):
        x = model.table(tokens[i]).detach().requires_grad_()  # [T, 6]
        y = model.each(x).detach().requires_grad_()
        logits = model.last(torch.tanh(y).mean(0))
        F.cross_entropy(logits[None], labels[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        assert y.grad is not None
        for t in range(3):
            table = torch.zeros(11, 6, dtype=torch.float64)
            table[tokens[i, t]] = y.grad[t] @ model.each.weight.detach()
            row = []
            for name, param in model.named_parameters():
                dense = {"table.weight": table, "each.weight": torch.outer(y.grad[t], x[t].detach())}
                sides = random_sides(name, param, projection)
                matrix = dense.get(name, torch.zeros_like(param)).reshape(sides.matrix)
                matrix = matrix if sides.left is None else sides.left.double() @ matrix
                row.append((matrix if sides.right is None else matrix @ sides.right.double().t()).flatten())
            assert_close(found[:, i, t], directions @ torch.cat(row))


@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "cnn", "mlp_tokens"])
def test_positions_and_rest_are_the_whole(name: str) -> None:
    case = CASES[name]
    loss = case.losses["sum"]
    model, batch = case.model().eval(), case.batch(5, seed=3)
    index = Index.build(
        model, [(range(5), batch)], loss, projection=Projection(rank=3), dtype="fp64", reduction="sum"
    )
    found, rest = index.tokens(model, batch, [batch], loss)
    whole = index.influence(model, [batch], loss)
    assert_close(found.sum(2) + rest, whole, max(case.tolerance, 1e-10))
    if name != "cnn":
        assert found.shape[2] > 1
        assert found.abs().max() > 0


def test_an_average_is_the_weighted_mean() -> None:
    models = [net(seed) for seed in range(3)]
    indexes = [build(model) for model in models[:2]]
    turned = [(ids[::-1], (x.flip(0), y.flip(0))) for ids, (x, y) in batches()[::-1]]
    indexes.append(
        Index.build(models[2], turned, loss_fn, projection=Projection(rank=3, seed=4), dtype="fp64")
    )
    assert indexes[2].ids.to_list() == indexes[0].ids.to_list()[::-1]
    members = list(zip(indexes, models, strict=True))
    apart = [index.influence(model, queries(), loss_fn) for index, model in members]
    apart[2] = apart[2].flip(1)
    assert_close(average_influence(members, queries(), loss_fn), torch.stack(apart).mean(0))
    weighted = (apart[0] + 3 * apart[1] + 4 * apart[2]) / 8
    assert_close(average_influence(members, queries(), loss_fn, weights=[1, 3, 4]), weighted)
    with pytest.raises(InputError, match="2 of them for more"):
        average_influence(members[:], queries(), loss_fn, weights=[1, 3])
    with pytest.raises(InputError, match="there is none"):
        average_influence([], queries(), loss_fn)
    other = Index.build(models[0], batches(n=12), loss_fn, dtype="fp64")
    with pytest.raises(InputError, match="other ids"):
        average_influence([members[0], (other, models[0])], queries(), loss_fn)


def test_tracin_is_the_sum_over_checkpoints_of_inner_products() -> None:
    models, rates = [net(seed) for seed in range(2)], [0.3, 0.1]
    whole = Projection(kind="none")
    members = [(build(model, projection=whole), model) for model in models]
    found = average_influence(members, queries(), loss_fn, weights=rates, curvature="identity")
    truth = torch.zeros(5, N, dtype=torch.float64)
    for model, rate in zip(models, rates, strict=True):
        examples, asked = (
            torch.cat(list(dense_rows(model, d, whole).values()), 1) for d in (data(N, 1), data(5, 2))
        )
        truth += rate * asked @ examples.t()
    assert_close(found, truth / sum(rates))


def truth_for(scores: Tensor, noise: float) -> SubsetTruth:
    kept = draw_subsets(N, 40)
    losses = -(kept.double() @ scores.t())
    return SubsetTruth(kept, losses + noise * losses.std() * torch.randn(losses.shape, dtype=torch.float64))


def test_tuning_finds_the_setting_that_made_the_truth() -> None:
    torch.manual_seed(0)
    model = net()
    index = build(model, projection=Projection(rank=3, kind="pca"))
    assert index.curvatures == ("fisher", "ekfac", "kfac", "identity")
    for curvature, damping in (("fisher", 1e-3), ("ekfac", 10.0), ("identity", 0.0)):
        made = index.influence(model, queries(), loss_fn, damping=damping, curvature=curvature)  # type: ignore[arg-type]
        found = index.tune(model, queries(), loss_fn, truth_for(made, 0.0))
        assert (found.curvature, found.damping) == (curvature, damping)
        assert found.table["score"][0] > 1 - 1e-9
        assert found.held_out.mean > 0.99
    chance = index.tune(model, queries(), loss_fn, truth_for(made, 100.0))
    assert chance.held_out.mean <= chance.table["score"][0]


def test_every_score_of_a_sweep_is_that_of_its_influence() -> None:
    torch.manual_seed(0)
    model = net()
    index = build(model)
    truth = truth_for(torch.randn(5, N, dtype=torch.float64), 0.1)
    found = index.tune(model, queries(), loss_fn, truth, dampings=[0.01, 1.0], curvatures=["fisher"])
    assert len(found.table) == 2
    for row in found.table.to_dicts():
        scores = index.influence(model, queries(), loss_fn, damping=row["damping"])
        each = [
            spearmanr((truth.kept.double() @ scores[q]).numpy(), -truth.losses[:, q].numpy()).statistic
            for q in range(5)
        ]
        assert row["score"] == pytest.approx(sum(each) / 5, abs=1e-9)


@pytest.mark.parametrize("curvature", ["fisher", "ekfac", "identity"])
def test_a_smaller_rank_is_an_index_of_that_rank(curvature: Any) -> None:
    model = net()
    large = build(model, projection=Projection(rank=4, kind="pca"))
    small = build(model, projection=Projection(rank=2, kind="pca"))
    made = small.influence(model, queries(), loss_fn, damping=0.01, curvature=curvature)
    truth = truth_for(made, 0.0)
    found = large.tune(model, queries(), loss_fn, truth, [0.01], [curvature], ranks=[None, 4, 2])
    assert found.rank == 2
    assert found.table["score"][0] > 1 - 1e-9
    scores = dict(zip(found.table["rank"].to_list(), found.table["score"].to_list(), strict=True))
    assert scores[None] == pytest.approx(scores[4], abs=1e-12)
    assert scores[4] < 1 - 1e-9


def test_a_shorter_random_projection_keeps_inner_products_on_average() -> None:
    from assay.index.tune import Reduced

    model, whole = net(), Projection(kind="none")
    truth = torch.cat(list(dense_rows(model, data(N, 1), whole).values()), 1)
    lengths = []
    for seed in range(60):
        index = build(model, projection=Projection(rank=4, seed=seed))
        sides = {n: random_sides(n, p, Projection(rank=4, seed=seed)) for n, p in model.named_parameters()}
        reduced = Reduced.of(index._header.layers, sides, 2, random=True)
        lengths.append(reduced.rows(index.gradients()).square().sum(1))
    ratio = torch.stack(lengths).mean(0) / truth.square().sum(1)
    assert (ratio.mean() - 1).abs() < 0.15


def test_refusals_of_tuning() -> None:
    model = net()
    index = build(model)
    with pytest.raises(InputError, match="keeps 9 examples"):
        index.tune(model, queries(), loss_fn, SubsetTruth(draw_subsets(9, 5), torch.zeros(5, 5)))
    with pytest.raises(InputError, match="has 4 queries"):
        index.tune(model, queries(), loss_fn, SubsetTruth(draw_subsets(N, 5), torch.zeros(5, 4)))
    with pytest.raises(InputError, match="nothing to try"):
        index.tune(model, queries(), loss_fn, SubsetTruth(draw_subsets(N, 5), torch.zeros(5, 5)), ranks=[])
