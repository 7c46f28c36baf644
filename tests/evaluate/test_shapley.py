"""The ground truths themselves: against permutations written out, axioms, and each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import assay
from assay.evaluate import StepUtility, monte_carlo_shapley, sample_gradients, shapley_values


def game(players: int, seed: int = 0) -> tuple[Tensor, object]:
    """A utility with a random worth for every subset, two numbers each."""
    table = torch.randn(2**players, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    powers = 2 ** torch.arange(players)

    def utility(mask: Tensor) -> Tensor:
        return table[int((powers * mask).sum())]

    return table, utility


def by_orders(utility: object, players: int) -> Tensor:
    total = torch.zeros(players, 2, dtype=torch.float64)
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        mask = torch.zeros(players, dtype=torch.bool)
        for i in order:
            before = utility(mask)  # type: ignore[operator]
            mask[i] = True
            total[i] += utility(mask) - before  # type: ignore[operator]
    return total / len(orders)


@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_all_subsets_are_all_orders(players: int) -> None:
    table, utility = game(players)
    found = shapley_values(utility, players)  # type: ignore[arg-type]
    torch.testing.assert_close(found, by_orders(utility, players), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sum(0), table[-1] - table[0], rtol=1e-12, atol=1e-12)


def test_random_orders_come_near_within_their_error() -> None:
    _, utility = game(6)
    exact = shapley_values(utility, 6)  # type: ignore[arg-type]
    found, error = monte_carlo_shapley(utility, 6, permutations=4000, seed=3)  # type: ignore[arg-type]
    assert ((found - exact).abs() < 4.5 * error).all()
    assert (error < 0.05).all()


def test_a_subset_is_asked_for_once() -> None:
    asked: list[tuple[bool, ...]] = []

    def utility(mask: Tensor) -> Tensor:
        asked.append(tuple(mask.tolist()))
        return mask.sum().double()

    monte_carlo_shapley(utility, 4, permutations=100)
    assert len(asked) == len(set(asked)) <= 16


def test_a_step_of_some_samples() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    start = {p: p.detach().clone() for p in model.parameters()}
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])

    def loss(i: int) -> Tensor:
        return nn.functional.cross_entropy(model(x[[i]]), y[[i]]) / 4

    target = assay.Target([(x, y)], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    gradients = sample_gradients(loss, 4, list(model.parameters()))
    moves = {p: 0.5 * g for p, g in gradients.items()}
    others = {p: 0.01 * p.detach() for p in model.parameters()}
    utility = StepUtility(model, {"t": target}, moves, others)
    found = utility(torch.tensor([True, False, True, False]))
    assert all(torch.equal(p, start[p]) for p in start)
    before = target.loss(model, (x, y)).detach()
    with torch.no_grad():
        for p in start:
            p.sub_(others[p] + moves[p][0] + moves[p][2])
    torch.testing.assert_close(found[0], before - target.loss(model, (x, y)).detach())


@pytest.mark.parametrize("players", [0, 21])
def test_too_many_subsets(players: int) -> None:
    with pytest.raises(assay.InputError, match=f"players={players}"):
        shapley_values(lambda mask: mask.sum(), players)


def test_one_order_has_no_error() -> None:
    with pytest.raises(assay.InputError, match="at least 2"):
        monte_carlo_shapley(lambda mask: mask.sum(), 3, permutations=1)
