"""One optimizer step by cause: what of it must live until its values are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.held import Held, Scaled, number_of, scaled
from assay.capture.marks import Directions
from assay.capture.recompute import Recompute
from assay.capture.tokens import contract_by_token
from assay.distributed import OneProcess, local
from assay.methods.base import MicroBatch
from assay.optimizers import OptimizerModel
from assay.optimizers.pieces import Piece, pieces
from assay.optimizers.scalars import Multiple

__all__ = ["Step", "along", "read_step"]


PIECE = 1 << 18  # entries of a parameter that are read at once: what is made of them stays in the cache


@dataclass(frozen=True)
class Folded:
    """A step along one gradient that was known when it was read; gains and parts were never written out.

    Args:
        gradient: `{parameter: [targets, *shape]}`.
        directions: K_t ∇ℓ / lr.
        carried: `[targets]`: ⟨∇ℓ, carried⟩.
        decayed: `[targets]`: ⟨∇ℓ, decayed⟩.
    """

    gradient: Directions
    directions: Directions
    carried: Tensor
    decayed: Tensor


@dataclass
class Step:
    """`w_t − w_{t+1} = K_t Σ_i g_i + carried + decayed`, parameter by parameter.

    Args:
        number: of the step.
        batches: its micro-batches, with the per-sample gradients that were kept.
        lr: `[groups]` learning rates.
        scale: `[groups]` c, what the loop multiplied the gradient by since `backward()`.
        loss_scale: by which `step()` itself divides the gradient; 1 where it does not.
        gains: K_t / lr of each parameter that moves; contains 1 / loss_scale.
        carried: what the momentum of earlier gradients moves.
        decayed: what the weight decay moves.
        processes: that train together; where they shard the model, gains and parts are those of the shards.
        kappas: what `momentum.Tail.weigh` said of the earlier steps, in its order.
        counts: the optimizer's own number of this step, by parameter; filled where the momentum is shared out.
    """

    number: int
    batches: Sequence[MicroBatch]
    lr: Tensor
    scale: Tensor
    loss_scale: float | Tensor
    gains: Mapping[Parameter, Tensor | float]
    carried: Mapping[Parameter, Tensor | Multiple | float]
    decayed: Mapping[Parameter, Tensor | Multiple | float]
    processes: OneProcess
    counts: dict[Parameter, int] = field(default_factory=dict)
    kappas: list[dict[Parameter, float]] = field(default_factory=list)
    folded: Folded | None = None

    def riding_values(self) -> list[Tensor]:
        """`[targets, B]` by micro-batch, from the scores that came with the backward pass along ∇ℓ ⊙ K/lr.

        Those directions were made before the loss scale of `step()` was known.
        """
        factor = self.lr * self.scale / self.loss_scale
        return [_weighted(factor, batch.scores) for batch in self.batches]

    def values(self, gradient: Directions) -> list[Tensor]:
        """`[targets, B]` by micro-batch: ⟨∇ℓ, K_t g_i⟩ for `{parameter: [targets, *shape]}`, from kept gradients."""
        directions, factor = self._directions(gradient), self.lr * self.scale
        return [_weighted(factor, self._products(batch, directions)) for batch in self.batches]

    def _products(self, batch: MicroBatch, directions: Directions) -> Tensor:
        """`[groups, targets, B]`, from what was kept or by taking the forward passes again; the weights are w_t."""
        if isinstance(batch.watch, Recompute):
            with self.processes.aside():
                return batch.watch.products(directions, batch.scores)
        return self.processes.contract(batch.kept, directions, batch.scores)

    def token_values(self, gradient: Directions) -> list[Tensor]:
        """`[targets, B, T + 1]` by micro-batch: `values` taken apart by token, what has no position last."""
        directions, factor = self._directions(gradient), self.lr * self.scale
        scores = [contract_by_token(b.kept, directions, b.scores, b.positions) for b in self.batches]
        return [torch.einsum("g,gnbt->nbt", factor.to(found), found) for found in scores]

    def _directions(self, gradient: Directions) -> Directions:
        """K_t ∇ℓ / lr; zero for parameters that do not move."""
        if self.folded is not None:
            assert gradient is self.folded.gradient
            return self.folded.directions
        return scaled(gradient, self.gains.get)

    def carried_by(self, gradient: Directions) -> Tensor:
        """`[targets]`: ⟨∇ℓ, carried⟩."""
        if self.folded is not None:
            return self.folded.carried
        return self.processes.whole(_total(gradient, self.carried))

    def decayed_by(self, gradient: Directions) -> Tensor:
        """`[targets]`: ⟨∇ℓ, decayed⟩."""
        if self.folded is not None:
            return self.folded.decayed
        return self.processes.whole(_total(gradient, self.decayed))


def read_step(
    optimizer: OptimizerModel,
    params: Sequence[Parameter],
    number: int,
    batches: Sequence[MicroBatch],
    scale: Tensor,
    processes: OneProcess,
    rides: bool = False,
    only: Directions | None = None,
    reads: Mapping[Parameter, Callable[[Tensor], Tensor]] | None = None,
) -> Step:
    """Read a coming step from the optimizer, in its pre-hook: the weights have not moved yet.

    Args:
        optimizer: the model of its step.
        params: the parameters to read.
        number: of the step.
        batches: its micro-batches.
        scale: `[groups]`, c.
        processes: that train together.
        rides: the values came with the backward pass, so that no gain is needed any more.
        only: the one gradient that the step will be asked about, in one process without shards.
        reads: the entries of each parameter whose gains will be asked for, and nothing else; for optimizers that work
            entry by entry, in one process.
    """
    like = batches[0].scores
    moves: dict[Parameter, tuple[Tensor | Multiple | float, Tensor | Multiple | float]]
    gains: dict[Parameter, Tensor | float] = {}
    folded: Folded | None = None
    if only is not None and optimizer.elementwise:
        moves, folded = {}, _folded(optimizer, only)
    elif rides:
        moves = {p: optimizer.moves(p) for p in params if p.grad is not None}
    elif reads is not None:
        moves, gains = {}, {p: optimizer.gain_at(p, reads[p]) for p in params if p.grad is not None}
    else:
        splits = {p: optimizer.split(p) for p in params if p.grad is not None}
        gains = {p: local(s.gain) if isinstance(s.gain, Tensor) else s.gain for p, s in splits.items()}
        moves = {p: (s.carried, s.decayed) for p, s in splits.items()}
    lr = torch.stack([_rate(optimizer.lr(g), like) for g in range(scale.shape[0])])
    return Step(
        number,
        batches,
        lr,
        scale.to(like),
        optimizer.grad_scale(),
        gains,
        {p: _held(carried) for p, (carried, _) in moves.items()},
        {p: _held(decayed) for p, (_, decayed) in moves.items()},
        processes,
        folded=folded,
    )


def _folded(optimizer: OptimizerModel, gradient: Directions) -> Folded:
    """Read the step and what it makes of a gradient, a piece at a time on a CPU."""
    some, targets = next(iter(gradient)), number_of(gradient)
    wide = torch.promote_types(some.dtype, torch.float32)
    sums = torch.zeros(2, targets, dtype=wide, device=some.device)  # carried, decayed
    if isinstance(gradient, Held):  # K ⊙ ∇ℓ would be a copy of the weights again: formed when it is read
        for p in gradient:
            if p.grad is not None:
                split, G = optimizer.split(p), gradient[p]
                sums[0] += along(G, split.carried).to(sums)
                sums[1] += along(G, split.decayed).to(sums)
        directions = Scaled(gradient, partial(_gain, optimizer), diagonal=optimizer.preconditioned)
        return Folded(gradient, directions, sums[0], sums[1])
    written = {p: torch.zeros_like(G) for p, G in gradient.items() if p.grad is None}
    moving = [p for p in gradient if p.grad is not None]
    size = PIECE if some.device.type == "cpu" else max((p.numel() for p in moving), default=1)
    for piece in pieces(optimizer, moving, size):
        parts, (own, through) = piece.parts, _through(gradient, piece, written)
        for total, moved in zip(sums, (parts.carried, parts.decayed), strict=True):
            gained = isinstance(moved, Multiple) and moved.gained  # ⟨∇ℓ, K ⊙ m⟩ = ⟨K ⊙ ∇ℓ, m⟩
            total += along(through if gained else own, moved).to(total)
    return Folded(gradient, written, sums[0], sums[1])


def _through(gradient: Directions, piece: Piece, written: dict[Parameter, Tensor]) -> tuple[Tensor, Tensor]:
    """`[targets, entries]` ∇ℓ of a piece and K_t ∇ℓ / lr, which goes where it belongs in `written` as well."""
    (first, part), gain = piece.where[0], piece.parts.gain
    rows = {p: gradient[p].reshape(number_of(gradient), -1)[:, part] for p, part in piece.where}
    if len(rows) > 1:
        own, sizes = torch.cat(list(rows.values()), 1), [row.shape[1] for row in rows.values()]
        through = own * gain
        for p, found in zip(rows, through.split_with_sizes(sizes, 1), strict=True):
            written[p] = found.view(gradient[p].shape)
        return own, through
    (own,) = rows.values()
    if first not in written:
        written[first] = gradient[first].new_empty(gradient[first].shape, dtype=torch.result_type(own, gain))
    made = written[first].view(len(own), -1)
    return own, torch.mul(own, gain, out=made[:, part])


def _gain(optimizer: OptimizerModel, param: Parameter) -> Tensor | float | None:
    """K_t / lr, in the optimizer's pre-hook."""
    return None if param.grad is None else optimizer.split(param).gain


def along(direction: Tensor, moved: Tensor | Multiple | float) -> Tensor:
    """`[targets]`: ⟨∇ℓ_n, moved⟩."""
    if isinstance(moved, Multiple):
        return along(direction, moved.tensor) * moved.factor
    rows = direction.reshape(direction.shape[0], -1)
    if not isinstance(moved, Tensor):
        return rows.sum(1) * moved if moved else rows.new_zeros(rows.shape[0])
    wide = torch.promote_types(direction.dtype, moved.dtype)
    return rows.to(wide) @ moved.to(wide).expand(direction.shape[1:]).flatten()


def _rate(lr: Tensor | float, like: Tensor) -> Tensor:
    """A learning rate beside `like`; a number is filled in, since copying it to a device would wait for that."""
    if isinstance(lr, Tensor):
        return lr.to(like, non_blocking=True)
    return torch.full((), lr, dtype=like.dtype, device=like.device)


def _held(x: Tensor | Multiple | float) -> Tensor | Multiple | float:
    if isinstance(x, Multiple):
        return Multiple(x.factor, local(x.tensor))
    return local(x) if isinstance(x, Tensor) else x


def _weighted(factor: Tensor, scores: Tensor) -> Tensor:
    return torch.einsum("g,gnb->nb", factor.to(scores), scores)


def _total(gradient: Directions, moved: Mapping[Parameter, Tensor | Multiple | float]) -> Tensor:
    still = 0.0  # what does not move at all
    parts = [along(gradient[p], m) for p, m in moved.items() if not isinstance(m, float) or m != still]
    if parts:
        return torch.stack(parts).sum(0)
    some = next(iter(gradient))
    return torch.zeros(number_of(gradient), dtype=some.dtype, device=some.device)
