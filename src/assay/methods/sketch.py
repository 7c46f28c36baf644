"""The carried line shared out from random projections of the per-sample gradients.

All per-sample gradients g of a step, over all parameters together, are folded into k numbers each:

    (Sg)_j = Σ_{e mod k = j} σ_e g_e            σ_e = ±1 at random, the same for the whole run

E[(Sg)·(Sd)] = g·d, with a variance of about ‖g‖²‖d‖²/k (the count sketch of Charikar, Chen and Farach-Colton, 2002,
with a fixed bucket for each entry and random signs). The product wanted is (Rg)·(R⁻¹ P_t Ḡ_t) with any diagonal R.
R = 1 would be a bad choice under Adam, whose P_t is huge wherever gradients are small: then ‖P_t Ḡ_t‖ is ruled by
entries where g has nothing. R = √P_s of a recent step balances the two; it is taken anew after 1, 2, 4, … steps and
then once per horizon, and a step's sketches stay with the R that they were made with.

A step's shares are then moved by the least amount, in the metric of their variances, that makes them add up to the
part of the exact carried line that the horizon covers: the total of a step has no sketching error, only its division
among samples has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from assay.capture.factors import Dense, Factors, Lookup, Outer
from assay.capture.held import scaled
from assay.capture.marks import Directions, Weight
from assay.methods.base import MicroBatch
from assay.methods.momentum import (
    Ids,
    Late,
    Through,
    Weigher,
    bytes_of,
    preconditioner,
    read_weights,
    shared,
    typical_size,
)
from assay.methods.step import Step
from assay.optimizers import OptimizerModel

__all__ = ["SketchTail"]


@dataclass
class _Past:
    """A step of the horizon.

    Args:
        ids: of its samples.
        sketches: `[samples, k]`, of R c_s g_i (of R P_s c_s g_i where the buffer holds preconditioned gradients).
        balance: R.
        counts: the optimizer's number of the step, by parameter.
        rest: the step with the per-sample gradients that have no sketch, if there are any.
        weights: w_s of the parameters that those need.
        through: P_s of the same.
    """

    ids: Ids
    sketches: Tensor
    balance: Through
    counts: Mapping[Parameter, int]
    rest: Step | None
    weights: Mapping[Parameter, Tensor]
    through: Through


class SketchTail:
    """Keeps k numbers per sample of the horizon.

    Weights that are computed from parameters, and operations without a closed form of their per-sample gradients
    (convolutions), have no sketch here: their gradients are kept as `ExactTail` keeps them.

    Args:
        optimizer: the model of its step.
        params: the watched parameters.
        horizon: how many steps are remembered.
        size: k; a prime keeps the folds of matrices out of step with their rows.
        seed: of the signs.
    """

    def __init__(
        self, optimizer: OptimizerModel, params: Sequence[Parameter], horizon: int, size: int, seed: int = 0
    ) -> None:
        self.optimizer, self.size = optimizer, size
        self.weigher = Weigher(optimizer, params)
        self._past: deque[_Past] = deque(maxlen=horizon)
        self._balance: Through = {}
        self._balanced_at = self._steps = 0
        self._start: dict[Parameter, int] = {}  # where a parameter's entries begin in the row of them all
        for p in params:
            self._start[p] = sum(q.numel() for q in self._start)
        generator = torch.Generator().manual_seed(seed)
        self._signs = {
            p: torch.randint(0, 2, (p.numel(),), generator=generator, dtype=torch.int8)
            .mul_(2)
            .sub_(1)
            .to(p.device)
            for p in params
        }

    # --- the step ---

    def weigh(self, step: Step) -> None:
        """Sketch the step's gradients, and note κ_{t,s} for the steps remembered."""
        step.counts = self.weigher.count()
        step.kappas = [self.weigher.kappas(step.counts, past.counts) for past in self._past]
        self._through = preconditioner(self.optimizer, step)
        self._rebalance()
        self._open = self._sketched(step)

    def share(self, step: Step, gradient: Directions, carried: Tensor) -> list[Late]:
        """Inner products of sketches, corrected to the exact total."""
        if not self._past:
            return []
        late, spread, sketch_of = [], [], _Cache(self, step, gradient, self._through)
        for past, kappas in zip(self._past, step.kappas, strict=True):
            direction = sketch_of(kappas, past.balance)  # [targets, k]
            found = direction @ past.sketches.t()  # [targets, samples]
            spread.append(
                direction.square().sum(1, keepdim=True) * past.sketches.square().sum(1)
            )  # k · variance
            if past.rest is not None:
                through = past.through if self.optimizer.buffer_is_preconditioned else self._through
                exact = shared(step, past.rest, gradient, kappas, through, past.weights)
                found = found + torch.cat([values for _, values in exact], 1)
            late.append((past.ids, found))
        return self._corrected(step, late, spread, carried)

    def remember(self, step: Step) -> None:
        """Keep the sketches that `weigh` made."""
        self._past.append(self._open)

    def pass_by(self) -> None:
        """The step counts, and nothing of it is remembered."""
        self.weigher.count()

    def bytes(self) -> int:
        """Size of the sketches, of what has none, of the signs and of every R in use."""
        used = {id(past.balance): past.balance for past in self._past}
        held = bytes_of(self._signs) + sum(map(bytes_of, used.values()))
        for past in self._past:
            held += bytes_of(past.sketches) + bytes_of(past.weights) + bytes_of(past.through)
            for batch in past.rest.batches if past.rest is not None else ():
                held += bytes_of([factors for _, factors in batch.kept])
        return held

    # --- the total ---

    def _corrected(self, step: Step, late: list[Late], spread: list[Tensor], carried: Tensor) -> list[Late]:
        """Spread what the total misses over the shares, in proportion to their variances.

        Not where the buffer holds more than samples' gradients (L2 decay), or where the horizon holds less than
        nine tenths of the buffer (a run that went on from a checkpoint): then the exact total is not known.
        """
        covered = self._covered(step)
        variances = torch.cat(spread, 1)  # [targets, all samples]
        coupled = any(self.optimizer.couples_decay(p) for p in step.counts)
        if coupled or covered < 0.9:
            return late
        found = torch.stack([values.sum(1) for _, values in late]).sum(0)  # [targets]
        found, total = step.processes.total(torch.stack([found, variances.sum(1).to(found)]))
        missing = carried * covered - found
        pull = torch.where(total > 0, missing / total, 0.0)
        parts = torch.split(pull[:, None] * variances, [len(ids) for ids, _ in late], 1)
        return [(ids, values + part) for (ids, values), part in zip(late, parts, strict=True)]

    def _covered(self, step: Step) -> float:
        """Which share of the weights in the buffer belongs to the steps remembered, least over the parameters."""
        least = 1.0
        known: dict[tuple[int, int], float] = {}
        for p, t in step.counts.items():
            key = (self.optimizer.group_index(p), t)
            if key not in known:
                held = sum(kappas.get(p, 0.0) for kappas in step.kappas)
                whole, s = held, t - 1
                remembered = {past.counts.get(p) for past in self._past}
                while s >= 1 and (weight := self.optimizer.tail(p, t, s)) > 1e-6 * max(held, 1e-30):
                    whole += 0.0 if s in remembered else weight
                    s -= 1
                known[key] = held / whole if whole else 1.0
            least = min(least, known[key])
        return least

    # --- sketches ---

    def _rebalance(self) -> None:
        """Take R anew where it is due."""
        horizon, at = self._past.maxlen or 1, self._balanced_at
        self._steps += 1
        due = not self._balance or self._steps >= at + min(at, horizon)
        if due and self.optimizer.preconditioned and not self.optimizer.buffer_is_preconditioned:
            self._balance = {p: _balance(p, through) for p, through in self._through.items()}
            self._balanced_at = self._steps

    def _sketched(self, step: Step) -> _Past:
        """The step's samples in k numbers each; what cannot be sketched goes along as it is."""
        through = self._through if self.optimizer.buffer_is_preconditioned else {}
        rows, rest = [], []
        for batch in step.batches:
            sketch = batch.scores.new_zeros(len(batch.ids), self.size)
            left = []
            for weight, factors in batch.kept:
                if not self._add(sketch, weight, factors, step, through):
                    left.append((weight, factors))
            rows.append(sketch)
            rest.append(MicroBatch(batch.ids, batch.scores, left))
        ids = [i for batch in step.batches for i in batch.ids]
        remaining = None
        weights: dict[Parameter, Tensor] = {}
        if any(batch.kept for batch in rest):
            remaining = replace(step, batches=rest, gains={}, carried={}, decayed={}, kappas=[])
            weights = {p: p.detach().clone() for p in read_weights(remaining)}
        kept = {p for batch in rest for weight, _ in batch.kept for p in weight.params}
        return _Past(
            ids, torch.cat(rows), self._balance, step.counts, remaining, weights,
            {p: through[p] for p in kept if p in through},
        )  # fmt: skip

    def _add(self, sketch: Tensor, weight: Weight, factors: Factors, step: Step, through: Through) -> bool:
        """Add the sketch of one use's gradients to `[B, k]`, if they have one."""
        if weight.derived:
            return False
        (param,) = weight.params
        if param not in step.counts:
            return True  # the step passes over it
        group = self.optimizer.group_index(param)
        factor = step.scale[group] / step.loss_scale
        gain = times_signs(self._signs[param], through.get(param, 1.0))  # [numel]
        gain = times_signs(gain, self._balance.get(param, 1.0))
        start = self._start[param]
        if isinstance(factors, Lookup) and factors.layout.labels is None:
            found = _fold_lookup(factors, gain, self.size, start)
        else:
            dense = _dense(factors)
            if dense is None:
                return False
            found = fold(dense.reshape(dense.shape[0], -1), gain, self.size, start)
        sketch += found.to(sketch.dtype) * factor
        return True

    def fold_directions(self, directions: Directions, balance: Through) -> Tensor:
        """`[targets, k]` from `{parameter: [targets, *shape]}`, divided by R."""
        parts = []
        for p, direction in directions.items():
            rows, own = direction.reshape(direction.shape[0], -1), balance.get(p, 1.0)
            signs = self._signs[p] / (own.reshape(-1) if isinstance(own, Tensor) else own)
            parts.append(fold(rows, signs, self.size, self._start[p]))
        return torch.stack(parts).sum(0)


class _Cache:
    """The sketch of lr_t κ_{t,s} Ḡ_t P_t by s: a multiple of one sketch wherever all parameters have the same κ."""

    def __init__(self, tail: SketchTail, step: Step, gradient: Directions, through: Through) -> None:
        self.tail = tail
        own = {} if tail.optimizer.buffer_is_preconditioned else through
        group = tail.optimizer.group_index
        self.directions = scaled(
            gradient, lambda p: own.get(p, 1.0) * step.lr[group(p)], step.counts, diagonal=True
        )
        self._units: dict[int, Tensor] = {}  # by the R that divides it

    def __call__(self, kappas: Mapping[Parameter, float], balance: Through) -> Tensor:
        """`[targets, k]`."""
        values = set(kappas.values())
        if len(values) == 1 and len(kappas) == len(self.directions):
            if id(balance) not in self._units:
                self._units[id(balance)] = self.tail.fold_directions(self.directions, balance)
            return self._units[id(balance)] * values.pop()
        weighted = scaled(self.directions, lambda p: kappas.get(p, 0.0), diagonal=True)
        return self.tail.fold_directions(weighted, balance)


def times_signs(signs: Tensor, gain: Tensor | float) -> Tensor:
    """`[numel]`: σ_e times the preconditioner."""
    return signs * gain.reshape(-1) if isinstance(gain, Tensor) else signs * gain


def _balance(param: Parameter, through: Tensor | float) -> Tensor | float:
    """R = √|P|, no more than ten times its typical size where there are gradients; entries without any keep that."""
    if not isinstance(through, Tensor):
        return abs(through) ** 0.5 or 1.0
    bounded = torch.minimum(through.abs(), 100 * typical_size(through, param)).sqrt_()
    return torch.where(bounded > 0, bounded, 1.0)


def fold(x: Tensor, signs: Tensor, size: int, start: int = 0) -> Tensor:
    """`[rows, size]` from `[rows, n]`: entry e goes to bucket (start + e) mod size with its sign.

    Example:
        >>> fold(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1, 1, -1]), size=2)
        tensor([[-2.,  2.]])
    """
    before, x = start % size, x.to(torch.promote_types(x.dtype, torch.float32))
    padded = F.pad(x * signs, (before, -(before + x.shape[1]) % size))
    return padded.view(x.shape[0], -1, size).sum(1)


def _fold_lookup(factors: Lookup, signs: Tensor, size: int, start: int) -> Tensor:
    """`[B, size]`: the fold of an embedding's gradients without writing them out."""
    b = factors.layout.grouped(factors.b)
    b = b.to(torch.promote_types(b.dtype, signs.dtype if signs.is_floating_point() else torch.float32))
    batch, p = b.shape[0], b.shape[-1]
    b = b.reshape(batch, -1, p)  # [B, T, p]
    indices = factors.layout.grouped(factors.indices).reshape(batch, -1)  # [B, T]
    entries = indices[..., None] * p + torch.arange(p, device=b.device)  # [B, T, p]
    signed = (b * signs[entries]).flatten(1)
    return b.new_zeros(batch, size).scatter_add_(1, (start + entries).remainder(size).flatten(1), signed)


def _dense(factors: Factors) -> Tensor | None:
    """`[B, *weight.shape]` in the weight's own orientation, where that has a closed form."""
    if isinstance(factors, Dense):
        return factors.gradients
    if not isinstance(factors, Outer) or factors.layout.labels is not None:
        return None
    layout = factors.layout
    if layout.dim >= factors.b.dim() - 1:
        return None
    a, b = (factors.b, factors.a) if factors.transposed else (factors.a, factors.b)
    a, b = (layout.grouped(x).reshape(layout.batch, -1, x.shape[-1]) for x in (a, b))
    return torch.bmm(b.transpose(1, 2), a)
