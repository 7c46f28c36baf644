"""Per-sample gradient norms and directions, from the same backward pass that trains.

    norm    ‖c g_i‖                                  c: what the loop did to the gradient (clipping, loss scale)
    cosine  ⟨c g_i, g⟩ / (‖c g_i‖ ‖g‖)               with the gradient g = .grad that the optimizer receives
    cosine:TARGET  the same with ∇ℓ_target(w_t)      positive: a step along −g_i lowers the target's loss

g_i is the part of ∂L/∂w that flows through sample i's use of the weights, so that Σ_i c g_i = .grad: with a loss that
is a mean over B samples, the norm has the factor 1/B. The norm over a run's first steps is the GraNd score of data
pruning (Paul et al., arXiv 2107.07075, section 2.2), up to that factor.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture import contract
from assay.capture.gradients import squared_norms
from assay.errors import InputError
from assay.methods.base import Context, Demand, MicroBatch
from assay.targets import Target

__all__ = ["GradientNorms"]


class GradientNorms:
    """The norm of every sample's gradient, and its cosines with the step's gradient and the targets' gradients.

    Exact for every parameter that is watched, tied weights included. It keeps the per-sample gradients of a
    micro-batch until the optimizer's step, which costs memory; `every` thins the steps out.

    Args:
        targets: name → `Target` whose gradients the samples' are compared with; one validation pass per step and
            target. None compares with the step's own gradient only.
        every: measure steps 0, every, 2·every, ….

    Raises:
        InputError: an argument is not understood.

    Example:
        >>> import assay
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with assay.Run(model, optimizer, methods=[assay.GradientNorms()]) as run:
        ...     with run.step(["a", "b"]):
        ...         model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        ...     optimizer.step()
        >>> run.ledger.norms().select("step", "id", "norm").rows()
        [(0, 'a', 5.0), (0, 'b', 1.0)]
    """

    def __init__(self, targets: Mapping[str, Target] | Target | None = None, *, every: int = 1) -> None:
        self.targets = {"target": targets} if isinstance(targets, Target) else dict(targets or {})
        for name, target in self.targets.items():
            if not isinstance(target, Target):
                raise InputError(
                    f"GradientNorms: target {name!r} must be an assay.Target, not {type(target).__name__}."
                )
        if not (isinstance(every, int) and every >= 1):
            raise InputError(f"GradientNorms(every={every!r}) must be a whole number from 1 on.")
        self.every = every

    @property
    def target_names(self) -> list[str]:
        """None: it writes no values."""
        return []

    def describe(self) -> Mapping[str, Any]:
        """The settings, for the run's information."""
        return {"method": "gradient norms", "targets": list(self.targets), "every": self.every}

    def attach(self, context: Context) -> NormsSession:
        """Start in a run."""
        return NormsSession(self, context)


class NormsSession:
    """`GradientNorms` at work in one run."""

    def __init__(self, method: GradientNorms, context: Context) -> None:
        if context.processes.sharded:
            raise InputError(
                "GradientNorms needs whole parameters, which fully_shard does not leave to one process; train with "
                "DistributedDataParallel, or leave it out."
            )
        self.method, self.context = method, context
        self.params = context.weights.params
        self.passes = context.processes.target_pass(method.targets, self.params) if method.targets else None
        self.seconds = 0.0
        self._wanted = False
        self._gradients: dict[Parameter, Tensor] = {}

    def begin_step(self, step: int) -> Demand:
        """Take the targets' gradients."""
        started = time.perf_counter()
        self._wanted = step % self.method.every == 0
        if not self._wanted:
            return Demand()
        self._gradients = self.passes.gradients()[1] if self.passes is not None else {}
        self.seconds += time.perf_counter() - started
        return Demand(keep=self.params)

    def retake(self) -> Demand:
        """The first step's gradients again, in the precision of the training's own forward pass."""
        if not self._wanted:
            return Demand()
        self._gradients = self.passes.gradients()[1] if self.passes is not None else {}
        return Demand(keep=self.params)

    def before_update(self, step: int, batches: Sequence[MicroBatch], scale: Tensor, gap: Tensor) -> None:
        """Measure the step's samples; the gradient is as the optimizer will use it."""
        if not self._wanted:
            return
        started = time.perf_counter()
        directions = {
            p: torch.cat([_filled(p)[None], *([self._gradients[p]] if self._gradients else [])])
            for p in self.params
        }  # [1 + targets, *shape]
        lengths = torch.stack([d.flatten(1).square().sum(1) for d in directions.values()]).sum(0).sqrt()
        for micro, batch in enumerate(batches):
            norms, cosines = self._measured(batch, scale, directions, lengths)
            names = ["cosine", *(f"cosine:{name}" for name in self.method.targets)]
            rows = len(norms)
            columns = {
                "step": pl.repeat(step, rows, eager=True, dtype=pl.Int64),
                "micro": pl.repeat(micro, rows, eager=True, dtype=pl.Int64),
                "norm": pl.Series(norms.tolist(), dtype=pl.Float64),
                **{
                    n: pl.Series(c.tolist(), dtype=pl.Float64).fill_nan(None)
                    for n, c in zip(names, cosines, strict=True)
                },
            }
            self.context.writer.add_rows("norms", batch.ids, columns)
        self.seconds += time.perf_counter() - started

    def _measured(
        self, batch: MicroBatch, scale: Tensor, directions: Mapping[Parameter, Tensor], lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`[B]` norms and `[1 + targets, B]` cosines, NaN where a gradient is zero."""
        weights = self.context.weights
        squares = squared_norms(batch.kept, weights.names, batch.scores.shape[2])
        factor = scale.to(batch.scores)  # [groups]
        total = torch.zeros_like(batch.scores[0, 0])
        for param, square in squares.items():
            total += factor[weights.groups[param]].square() * square.to(total)
        products = contract(batch.kept, directions, batch.scores)  # [groups, 1 + targets, B]
        norms = total.sqrt()
        return norms, torch.einsum("g,gnb->nb", factor, products) / (lengths.to(norms)[:, None] * norms)

    def skipped(self, step: int) -> None:
        """Nothing was used."""

    def unattended_update(self) -> None:
        """Nothing is open."""

    def flush(self) -> None:
        """Everything is with the writer already."""

    def close(self) -> None:
        """Nothing is open."""

    def explained(self) -> Mapping[str, float]:
        """It explains no loss."""
        return {}


def _filled(param: Parameter) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad
