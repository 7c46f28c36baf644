"""Detection, retrieval and comparison against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from assay.errors import InputError
from assay.evaluate.baselines import Scores
from assay.evaluate.compare import Compared, compare, recommended
from assay.evaluate.intervals import over_seeds
from assay.evaluate.metrics import best, detection, retrieval
from assay.evaluate.subsets import SubsetTruth, draw_subsets


def test_detection_counts_pairs_in_the_right_order() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.rand(60, generator=generator) < 0.2
    suspicion = torch.randn(60, generator=generator) + planted
    found = detection(suspicion, planted)
    above = suspicion[planted][:, None] > suspicion[~planted][None]
    assert found.auroc.mean == pytest.approx(above.double().mean().item())
    assert found.auroc.low < found.auroc.mean < found.auroc.high
    order = planted[suspicion.argsort(descending=True)].double()
    precision = order.cumsum(0) / torch.arange(1, 61)
    assert found.auprc.mean == pytest.approx((precision * order).sum().item() / order.sum().item())


def test_copies_are_found_by_what_they_are_worth() -> None:
    """Two copies share what one would be worth: the lowest values among equals are those of the copies."""
    values = torch.cat([torch.full((10,), 1.0), torch.full((4,), 0.5)])
    planted = torch.arange(14) >= 10
    assert detection(-values, planted, resamples=0).auprc.mean == 1.0
    assert detection(torch.zeros(14), planted, resamples=0).auroc.mean == 0.5


def test_detection_needs_both_kinds() -> None:
    with pytest.raises(InputError, match="0 planted"):
        detection(torch.rand(4), torch.zeros(4).bool())


def test_ranks_and_recall() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    found = retrieval(scores, torch.tensor([0, 1, 2]), ks=[1, 2, 3])
    assert found.rank.per_query.tolist() == [1.0, 3.0, 2.5]  # equal scores share their mean rank
    assert [found.recall[k].mean for k in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 1.0])
    two = retrieval(scores[:1], torch.tensor([[True, False, False, True]]), ks=[1, 4])
    assert (two.rank.mean, two.recall[1].mean, two.recall[4].mean) == (1.0, 0.5, 1.0)
    with pytest.raises(InputError, match="a right example for each query"):
        retrieval(scores, torch.zeros(3, 4).bool())


def test_the_best_share() -> None:
    assert best(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), 0.4).tolist() == [False, False, False, True, True]
    with pytest.raises(InputError, match="is 0 of them"):
        best(torch.rand(4), 0.05)


def test_the_interval_over_seeds_is_students() -> None:
    found = over_seeds([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.high - 2.5 == pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2)
    assert over_seeds([1.0]).low != over_seeds([1.0]).low  # of one seed there is none


def truth(noise: float) -> tuple[torch.Tensor, SubsetTruth]:
    generator = torch.Generator().manual_seed(0)
    worth = torch.randn(2, 30, generator=generator)
    kept = draw_subsets(30, 40)
    losses = -(kept.float() @ worth.t()) + noise * torch.randn(40, 2, generator=generator)
    return worth, SubsetTruth(kept, losses)


def test_comparison_is_the_mean_rank_correlation() -> None:
    worth, found = truth(noise=2.0)
    other = torch.randn(1, 30, generator=torch.Generator().manual_seed(3))
    rows = compare([Scores("other", other, 1.0), Scores("worth", worth, 2.0)], found)
    assert [row.name for row in rows] == ["worth", "other"]
    predicted = worth.double() @ (~found.kept).double().t()
    each = [spearmanr(predicted[q], found.losses[:, q]).statistic for q in range(2)]
    assert rows[0].lds == pytest.approx(sum(each) / 2)
    assert rows[0].better_than_chance
    assert not rows[0].behind
    assert rows[1].behind
    assert rows[1].low < rows[1].lds < rows[1].high


def test_scores_without_a_ranking_are_chance() -> None:
    _, found = truth(noise=0.0)
    (row,) = compare([Scores("flat", torch.zeros(1, 30), 1.0)], found)
    assert (row.lds, row.better_than_chance) == (0.0, False)
    assert recommended([row]) is None
    with pytest.raises(InputError, match="4 subsets say nothing"):
        compare([], SubsetTruth(found.kept[:4], found.losses[:4]))


def test_methods_of_one_name_are_refused() -> None:
    worth, found = truth(noise=0.0)
    scores = [Scores("one", worth, 1.0), Scores("two", worth, 1.0), Scores("one", -worth, 1.0)]
    with pytest.raises(InputError, match=r"several scores are named 'one': .* dataclasses.replace"):
        compare(scores, found)
    assert len(compare([*scores[:2], replace(scores[2], name="three")], found)) == 3


def test_what_is_much_cheaper_and_not_worse_is_recommended() -> None:
    def row(name: str, seconds: float, low: float, behind: bool) -> Compared:
        return Compared(name, 0.5, low, 0.9, seconds, behind)

    best, cheap, bad = row("a", 100.0, 0.2, False), row("b", 10.0, 0.1, False), row("c", 1.0, 0.1, True)
    chance = row("d", 1.0, -0.1, False)
    assert recommended([best, cheap, bad, chance]) is cheap
    assert recommended([best, cheap, bad], matters=60.0) is best
    assert recommended([chance]) is None
