"""Shapley values by their definition: over all subsets of the players, or over random orders of them.

    φ_i = Σ_{S ∌ i} |S|! (n − 1 − |S|)! / n! · (U(S ∪ i) − U(S))

Source: Shapley, Contributions to the Theory of Games II, 1953. For one training step the players are the samples
of its batch and U(S) is the fall of the target's loss if only S had moved the weights (Wang et al., arXiv
2406.11011, the local utility of section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import comb

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from assay.errors import InputError
from assay.targets import Target, TargetPass

__all__ = ["StepUtility", "monte_carlo_shapley", "sample_gradients", "shapley_values"]

Utility = Callable[[Tensor], Tensor]
"""From a mask `[players]`, true for who takes part, to a worth of any shape, the same at every call."""

MOST_PLAYERS = 20


def shapley_values(utility: Utility, players: int) -> Tensor:
    """Shapley values from the utilities of all 2ⁿ subsets.

    Args:
        utility: worth of a subset.
        players: n, at most 20.

    Returns:
        `[players, *worth]`, in the unit of the utility, float64.

    Raises:
        InputError: more players than can be enumerated, or none.

    Example:
        Who brings a left and who brings a right glove; a pair is worth 1.

        >>> shapley_values(lambda s: torch.minimum(s[0].int() + s[1].int(), s[2].int()), 3)
        tensor([0.1667, 0.1667, 0.6667], dtype=torch.float64)
    """
    if not 1 <= players <= MOST_PLAYERS:
        raise InputError(
            f"shapley_values(players={players}): 1 to {MOST_PLAYERS} players can be enumerated; "
            "take monte_carlo_shapley for more."
        )
    masks = (torch.arange(2**players)[:, None].bitwise_right_shift(torch.arange(players)) & 1).bool()
    worth = torch.stack([utility(mask).double() for mask in masks])  # [2ⁿ, *worth]
    sizes = masks.sum(1)
    weight = torch.tensor([1 / (players * comb(players - 1, k)) for k in range(players)], dtype=torch.float64)
    values = []
    for i in range(players):
        without = (~masks[:, i]).nonzero().flatten()
        gain = worth[without + 2**i] - worth[without]
        values.append(torch.tensordot(weight[sizes[without]], gain, 1))
    return torch.stack(values)


def monte_carlo_shapley(
    utility: Utility, players: int, permutations: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Shapley values from the marginal gains along random orders of the players.

    No subset is evaluated twice.

    Args:
        utility: worth of a subset.
        players: n.
        permutations: number of orders.
        seed: of the orders.

    Returns:
        The values and their standard errors, both `[players, *worth]`, float64.

    Raises:
        InputError: fewer than two orders, which leave no standard error.

    Example:
        >>> values, errors = monte_carlo_shapley(lambda s: s.sum() ** 2, players=4, permutations=200)
        >>> values.sum()
        tensor(16., dtype=torch.float64)
        >>> bool(((values - 4).abs() < 5 * errors).all())
        True
    """
    if permutations < 2:
        raise InputError(
            f"monte_carlo_shapley(permutations={permutations}): give at least 2, or there is no error."
        )
    generator = torch.Generator().manual_seed(seed)
    known: dict[bytes, Tensor] = {}

    def worth(mask: Tensor) -> Tensor:
        key = mask.numpy().tobytes()
        if key not in known:
            known[key] = utility(mask.clone()).double()
        return known[key]

    draws = []
    for _ in range(permutations):
        mask = torch.zeros(players, dtype=torch.bool)
        before, gains = worth(mask), []
        order = torch.randperm(players, generator=generator)
        for i in order:
            mask[i] = True
            after = worth(mask)
            gains.append(after - before)
            before = after
        draws.append(torch.stack(gains)[order.argsort()])
    gathered = torch.stack(draws)  # [permutations, players, *worth]
    return gathered.mean(0), gathered.std(0) / permutations**0.5


class StepUtility:
    """What a subset of a batch is worth in one training step: the fall of each target's loss if it alone moves.

    The optimizer's K is the one of the whole step, and what is not the samples' own (momentum, weight decay) moves in
    any case, so that U(∅) is its worth.

    Args:
        model: with the weights before the step; they are moved for each evaluation and put back.
        targets: name → target.
        moves: `{parameter: [players, *shape]}`, K g_i: by how much each player lowers the weights.
        others: `{parameter: shape}`, by how much the rest of the step lowers them.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> target = Target([None], lambda m, _: (m.weight - 1).square().sum())
        >>> utility = StepUtility(model, {"near one": target}, {model.weight: torch.tensor([[[-0.5]], [[-0.5]]])})
        >>> shapley_values(utility, 2).flatten()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        model: Module,
        targets: Mapping[str, Target],
        moves: Mapping[Parameter, Tensor],
        others: Mapping[Parameter, Tensor] | None = None,
    ) -> None:
        self.moves, self.others = moves, dict(others or {})
        self.passes = TargetPass(model, targets, list(moves))
        self.start = {p: p.detach().clone() for p in {**moves, **self.others}}
        self.before = self.passes.losses()

    def __call__(self, mask: Tensor) -> Tensor:
        """`[targets]`: U(S) for a mask `[players]`."""
        try:
            for p, w in self.start.items():
                p.data.copy_(w)
                if p in self.others:
                    p.data.sub_(self.others[p])
                if p in self.moves:
                    p.data.sub_(self.moves[p][mask.to(p.device)].sum(0))
            return self.before - self.passes.losses()
        finally:
            for p, w in self.start.items():
                p.data.copy_(w)


def sample_gradients(
    loss: Callable[[int], Tensor], samples: int, params: Sequence[Parameter]
) -> dict[Parameter, Tensor]:
    """`{parameter: [samples, *shape]}`, one backward pass per sample.

    Args:
        loss: from the number of a sample to its part of the training loss, a scalar.
        samples: how many.
        params: of the model.
    """
    rows = [
        torch.autograd.grad(loss(i), params, allow_unused=True, materialize_grads=True)
        for i in range(samples)
    ]
    return {p: torch.stack([row[k] for row in rows]) for k, p in enumerate(params)}
