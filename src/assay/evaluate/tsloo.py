"""Trajectory-specific leave-one-out by its definition: train again without it, everything else unchanged.

A *removal* drops the terms of some samples from the training loss of some steps: same start, same order, same random
numbers, and nothing else rescaled (a mean over B samples stays a sum of B − 1 terms over B). Its effect on a query is
the query's loss after that training minus the loss after the unbroken one, so that **positive = the removed samples
had lowered the query's loss**.

Many removals train side by side: one copy of the weights each, vectorised by `torch.func.vmap`.

Source: Wang et al., Capturing the Temporal Dependence of Training Data Influence, ICLR 2025, arXiv 2412.09538,
section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from assay.errors import InputError
from assay.evaluate.functional import State, check_functional, clip_factor, step

__all__ = ["Removal", "Training", "leave_out", "occurrences", "retrain"]

Removal = Sequence[tuple[int, int]]
"""(step, row) of every term that is dropped; rows count through the micro-batches of a step."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """A training run that can be repeated with terms of its loss left out.

    Args:
        model: with the weights at the start; it stays as it is. In training mode if dropout is to be drawn.
        optimizer: its groups and options; it never steps. SGD, Adam or AdamW, over all of the model's parameters.
        batches: the micro-batches of every step.
        terms: `terms(model, batch)`, `[B]`: each sample's term of the loss that is differentiated. Their sum is the
            loss: for a mean over the step's samples each term is the sample's loss over their number.
        rates: `rates(step)`, the learning rate of each parameter group; the groups' own if left out.
        clip: largest norm of a step's gradient.
        seed: random numbers are drawn from `seed + step` in every step, the same for all copies.

    Raises:
        UnsupportedOptimizerError: the optimizer is none of the three.
        InputError: the optimizer does not own every parameter of the model.
    """

    model: Module
    optimizer: Optimizer
    batches: Sequence[Sequence[Any]]
    terms: Callable[[Module, Any], Tensor]
    rates: Callable[[int], Sequence[float]] | None = None
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_functional(self.optimizer)
        missing = set(self.weights) - set(self.groups)
        if missing:
            raise InputError(
                f"Training(model, optimizer): {sorted(missing)[0]} is in no group of the optimizer; "
                "freeze it (requires_grad_(False)) or hand it to the optimizer."
            )

    @property
    def weights(self) -> Weights:
        """The trained parameters at the start, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def groups(self) -> dict[str, int]:
        """The optimizer's group of each parameter, by name."""
        where = {p: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        return {name: where[p] for name, p in self.model.named_parameters() if p in where}


def occurrences(ids: Sequence[Sequence[Any]], wanted: Iterable[Any], steps: Iterable[int]) -> Removal:
    """Where samples were seen: the removal of all their terms in the given steps.

    Args:
        ids: of every step, one id per row.
        wanted: the ids that are removed.
        steps: only in these: one step, those of the last epoch, or `range(len(ids))` for all.

    Example:
        >>> occurrences([["a", "b"], ["c", "a"]], ["a"], range(2))
        [(0, 0), (1, 1)]
    """
    chosen = set(wanted)
    return [(t, row) for t in steps for row, id_ in enumerate(ids[t]) if id_ in chosen]


def leave_out(
    training: Training,
    removals: Sequence[Removal],
    queries: Sequence[Any],
    loss_fn: Callable[[Module, Any], Tensor],
    *,
    chunk: int = 32,
) -> Tensor:
    """`[queries, removals]`: by how much each removal raises each query's loss, by honest retraining.

    Args:
        training: the run.
        removals: what is left out.
        queries: batches whose loss is asked for, the model in evaluation mode.
        loss_fn: `loss_fn(model, query)`, a scalar.
        chunk: copies that train side by side.

    Returns:
        In the unit of `loss_fn`, positive where the removed terms had lowered the loss, in the order of `removals`.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> x = torch.tensor([[1.0], [2.0]]).double()
        >>> run = Training(model, sgd, [[x]], lambda m, x: m(x)[:, 0] / 2)
        >>> leave_out(run, [[(0, 0)], [(0, 1)]], [x[:1]], lambda m, x: m(x).sum())
        tensor([[0.2500, 0.5000]], dtype=torch.float64)
    """
    (whole,) = (_losses(training, found, queries, loss_fn) for _, found in retrain(training, [()]))
    changes = whole.new_empty(len(queries), len(removals))
    for places, found in retrain(training, removals, chunk=chunk):
        changes[:, places] = _losses(training, found, queries, loss_fn) - whole
    return changes


def retrain(
    training: Training, removals: Sequence[Removal], *, chunk: int = 32
) -> Iterator[tuple[list[int], Weights]]:
    """The final weights of each removal, chunk by chunk.

    Yields:
        Which removals, and their weights by name, `[removals, *shape]`. Those whose first step is late come last, so
        that what they have in common with the unbroken run is trained once.
    """
    first = [min((t for t, _ in removal), default=len(training.batches)) for removal in removals]
    order = sorted(range(len(removals)), key=lambda r: first[r])
    trunk = _Copies(training, 1)
    for start in range(0, len(order), chunk):
        places = order[start : start + chunk]
        trunk.train(first[places[0]])
        copies = trunk.spread(len(places))
        dropped: dict[int, list[tuple[int, int]]] = {}
        for copy, place in enumerate(places):
            for t, row in removals[place]:
                dropped.setdefault(t, []).append((copy, row))
        copies.train(len(training.batches), dropped)
        yield places, copies.weights


class _Copies:
    """So many copies of the model, each with its optimizer's state, after `done` steps."""

    def __init__(self, training: Training, number: int) -> None:
        self.training, self.number, self.done = training, number, 0
        self.groups = training.groups
        self.weights: Weights = {name: w[None].clone() for name, w in training.weights.items()}
        self.state: dict[str, State] = {name: {} for name in self.weights}
        buffers = {name: b.detach().clone() for name, b in training.model.named_buffers()}

        def loss(weights: Weights, batch: Any, keep: Tensor) -> Tensor:
            terms: Tensor = functional_call(
                _Terms(training), {**_inner(weights), **_inner(buffers)}, (batch,)
            )
            return (keep * terms).sum()

        self._gradient = vmap(grad(loss), in_dims=(0, None, 0), randomness="same")

    def spread(self, number: int) -> _Copies:
        """So many copies of the one copy."""
        copies = _Copies(self.training, number)
        copies.done = self.done
        copies.weights = {n: w.expand(number, *w.shape[1:]) for n, w in self.weights.items()}
        copies.state = {
            n: {k: b.expand(number, *b.shape[1:]) for k, b in s.items()} for n, s in self.state.items()
        }
        return copies

    @torch.no_grad()
    def train(self, until: int, dropped: Mapping[int, Sequence[tuple[int, int]]] | None = None) -> None:
        """Take the steps up to `until`, without the (copy, row) that `dropped` names by step."""
        while self.done < until:
            self._step((dropped or {}).get(self.done, ()))
            self.done += 1

    def _step(self, dropped: Sequence[tuple[int, int]]) -> None:
        training, t = self.training, self.done
        gradients: Weights = {}
        before = 0
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(training.seed + t)
            for batch in training.batches[t]:
                rows = self._rows(batch)
                keep = torch.ones(self.number, rows, device=next(iter(self.weights.values())).device)
                for copy, row in dropped:
                    if before <= row < before + rows:
                        keep[copy, row - before] = 0.0
                found = self._gradient(self.weights, batch, keep)
                gradients = {n: gradients[n] + g for n, g in found.items()} if gradients else found
                before += rows
        outside = [row for _, row in dropped if row >= before]
        if outside:
            raise InputError(
                f"a removal names row {outside[0]} of step {t}, which has {before} rows; count from 0."
            )
        self._update(gradients)

    def _rows(self, batch: Any) -> int:
        """How many terms the batch has; the first copy is asked, the random numbers are put back."""
        leaves = [x for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.dim()]
        if leaves:
            return leaves[0].shape[0]
        one = {name: w[0] for name, w in self.weights.items()}
        with torch.random.fork_rng(devices=[]):
            return int(functional_call(_Terms(self.training), _inner(one), (batch,)).shape[0])

    def _update(self, gradients: Weights) -> None:
        training, t = self.training, self.done
        c = clip_factor(gradients, training.clip, self.number)
        groups = training.optimizer.param_groups
        rates = training.rates(t) if training.rates else [float(group["lr"]) for group in groups]
        for name, w in self.weights.items():
            g = gradients[name] * c.view(-1, *[1] * (w.dim() - 1))
            i = self.groups[name]
            self.weights[name], self.state[name] = step(
                type(training.optimizer), groups[i], rates[i], t + 1, w, g, self.state[name]
            )


class _Terms(Module):
    """`terms(model, batch)` as a module's forward pass, so that `functional_call` reaches every use of a weight."""

    def __init__(self, training: Training, loss: Callable[[Module, Any], Tensor] | None = None) -> None:
        super().__init__()
        self.inner = training.model
        self._loss = loss or training.terms

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.inner, batch)


def _inner(tensors: Weights) -> Weights:
    return {f"inner.{name}": x for name, x in tensors.items()}


@torch.no_grad()
def _losses(
    training: Training, weights: Weights, queries: Sequence[Any], loss_fn: Callable[[Module, Any], Tensor]
) -> Tensor:
    """`[queries, copies]`."""
    modes = {module: module.training for module in training.model.modules()}
    training.model.eval()
    try:
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):

            def loss(weights: Weights, query: Any) -> Tensor:
                found: Tensor = functional_call(_Terms(training, loss_fn), _inner(weights), (query,))
                return found

            each = vmap(loss, in_dims=(0, None), randomness="same")
            return torch.stack([each(weights, query) for query in queries])
    finally:
        for module, mode in modes.items():
            module.training = mode
