"""What momentum carries over, shared out among the earlier samples that it comes from.

A gradient of step s acts at step t > s with the weight κ_{t,s} of the optimizer's buffer, so that

    carried_t = Σ_{s<t} κ_{t,s} P_t c_s Σ_i g_i(s)            (P_t = K_t / κ_{t,t}: the preconditioner alone)

and sample i of step s is worth  κ_{t,s} Ḡ_tᵀ P_t c_s g_i(s)  at step t, with Ḡ_t the mean gradient of the target along
that step. `ExactTail` keeps the per-sample gradients of the horizon and forms these inner products; `SketchTail`
(`sketch`) keeps random projections of them. What the horizon does not reach stays on the account's line `carried`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.factors import Dense, Directional, Lookup, Outer
from assay.capture.held import scaled
from assay.capture.marks import Directions
from assay.distributed import local
from assay.methods.line import placed
from assay.methods.step import Step
from assay.optimizers import OptimizerModel
from assay.optimizers.scalars import number

__all__ = [
    "ExactTail",
    "Late",
    "Tail",
    "Weigher",
    "bytes_of",
    "default_horizon",
    "preconditioner",
    "typical_size",
]

Ids = Sequence[int | str]
Late = tuple[Ids, Tensor]  # ids, and what reached them only now, [targets, ids]
Through = Mapping[Parameter, Tensor | float]  # P_t by parameter


class Tail(Protocol):
    """Shares out the carried line; one call of each method per optimizer step, in this order."""

    def weigh(self, step: Step) -> None:
        """In the optimizer's pre-hook: note on the step its κ for every earlier step that is remembered."""
        ...

    def share(self, step: Step, gradient: Directions, carried: Tensor) -> list[Late]:
        """Values that arrive at this step, given Ḡ_t and what it says is `carried`, `[targets]`."""
        ...

    def remember(self, step: Step) -> None:
        """Keep what later steps will need of this one."""
        ...

    def pass_by(self) -> None:
        """In the optimizer's pre-hook of a step whose samples were not seen."""
        ...

    def bytes(self) -> int:
        """Memory that is held for the horizon now."""
        ...


def default_horizon(optimizer: OptimizerModel, params: Sequence[Parameter]) -> int:
    """The number of steps after which less than 1 % of a gradient's effect is still to come."""
    decay = max((optimizer.momentum_decay(p) for p in params), default=0.0)
    return math.ceil(math.log(0.01) / math.log(decay)) if 0 < decay < 1 else 0


class Weigher:
    """Counts each parameter's steps as the optimizer does, and reads κ from it.

    The optimizer's own count is read where it keeps one, on a device the first time only: then it is counted along.
    SGD keeps none, so its steps are counted here from the step that found the momentum buffer empty.

    Args:
        optimizer: the model of its step.
        params: the watched parameters.
    """

    def __init__(self, optimizer: OptimizerModel, params: Sequence[Parameter]) -> None:
        self.optimizer, self.params = optimizer, params
        self._counted: dict[Parameter, tuple[Any, int]] = {}  # the optimizer's count, and what it stands at

    def count(self) -> dict[Parameter, int]:
        """The coming step's number for every parameter that it moves; call once per step."""
        counts = {}
        for p in self.params:
            if p.grad is None:
                continue
            state = self.optimizer.optimizer.state.get(p, {})
            own = state.get("step")
            known, t = self._counted.get(p, (None, 1))
            if own is None:
                t = 1 if state.get("momentum_buffer") is None else t + 1
            elif isinstance(own, Tensor) and own.device.type != "cpu" and own is known:
                t += 1
            else:
                t = int(float(number(own))) + 1
            counts[p] = t
            self._counted[p] = own, t
        return counts

    def kappas(self, now: Mapping[Parameter, int], then: Mapping[Parameter, int]) -> dict[Parameter, float]:
        """κ_{t,s} of every parameter that moves in both steps."""
        known: dict[tuple[int, int, int], float] = {}
        result = {}
        for p, t in now.items():
            if p not in then:
                continue
            key = (self.optimizer.group_index(p), t, then[p])
            if key not in known:
                known[key] = self.optimizer.tail(p, t, then[p])
            result[p] = known[key]
        return result


def preconditioner(optimizer: OptimizerModel, step: Step) -> dict[Parameter, Tensor | float]:
    """P_t = gain_t / κ_{t,t} of each parameter that moves, for gradients without a loss scale."""
    result: dict[Parameter, Tensor | float] = {}
    for p, t in step.counts.items():
        kappa = optimizer.tail(p, t, t)
        if kappa != 0:
            result[p] = step.gains[p] * (step.loss_scale / kappa)
        else:  # SGD with a dampening of 1: the gradient enters the buffer only later
            group = optimizer.optimizer.param_groups[optimizer.group_index(p)]
            result[p] = -1.0 if group.get("maximize", False) else 1.0
    return result


def typical_size(through: Tensor, param: Parameter) -> Tensor:
    """0-dim, the mean of |P| over where the gradient is: an entry without any has P = 1/ε and moves nothing."""
    assert param.grad is not None
    size, weight = through.abs(), param.grad.detach().abs().to(through.dtype)
    total = weight.sum()
    return torch.where(total > 0, (size * weight).sum() / total, size.amin())


@dataclass
class _Past:
    """A step of the horizon."""

    step: Step
    counts: Mapping[Parameter, int]
    through: Through  # P_s where the buffer holds preconditioned gradients
    weights: Mapping[Parameter, Tensor]  # w_s, where an inner product needs it


class ExactTail:
    """Keeps every per-sample gradient of the horizon: small models, and the reference for the sketch.

    Args:
        optimizer: the model of its step.
        params: the watched parameters.
        horizon: how many steps are remembered.
    """

    def __init__(self, optimizer: OptimizerModel, params: Sequence[Parameter], horizon: int) -> None:
        self.optimizer, self.horizon = optimizer, horizon
        self.weigher = Weigher(optimizer, params)
        self._past: deque[_Past] = deque(maxlen=horizon)

    def weigh(self, step: Step) -> None:
        """κ_{t,s} for the steps remembered, and what the weights are now where that matters later."""
        step.counts = self.weigher.count()
        step.kappas = [self.weigher.kappas(step.counts, past.counts) for past in self._past]
        through = preconditioner(self.optimizer, step)
        moving = {p: local(p.detach()).clone() for p in read_weights(step)}
        self._open = _Past(step, step.counts, through, moving)

    def share(self, step: Step, gradient: Directions, carried: Tensor) -> list[Late]:
        """The inner products themselves."""
        late: list[Late] = []
        now = self._open.through
        for past, kappas in zip(self._past, step.kappas, strict=True):
            through = past.through if self.optimizer.buffer_is_preconditioned else now
            late += shared(step, past.step, gradient, kappas, through, past.weights)
        return late

    def remember(self, step: Step) -> None:
        """Keep the step as it is; without its parts that only its own values need."""
        step.gains, step.carried, step.decayed, step.kappas = {}, {}, {}, []
        if not self.optimizer.buffer_is_preconditioned:
            self._open.through = {}
        self._past.append(self._open)

    def pass_by(self) -> None:
        """The step counts, and nothing of it is remembered."""
        self.weigher.count()

    def bytes(self) -> int:
        """Size of the gradients and weights kept."""
        return sum(
            bytes_of([[factors for _, factors in batch.kept] for batch in past.step.batches])
            + bytes_of(past.weights)
            + bytes_of(past.through)
            for past in self._past
        )


def shared(
    step: Step,
    past: Step,
    gradient: Directions,
    kappas: Mapping[Parameter, float],
    through: Through,
    weights: Mapping[Parameter, Tensor],
) -> list[Late]:
    """κ_{t,s} lr_t c_s Ḡᵀ P g_i(s) for the samples of one earlier step, from their kept gradients."""
    directions = scaled(gradient, lambda p: through[p] * kappas[p] if p in kappas and p in through else None)
    factor = step.lr * past.scale / past.loss_scale
    late: list[Late] = []
    with placed(weights) if weights else nullcontext():
        for batch in past.batches:
            scores = step.processes.contract(batch.kept, directions, batch.scores)
            late.append((batch.ids, torch.einsum("g,gnb->nb", factor.to(scores), scores)))
    return late


def read_weights(step: Step) -> list[Parameter]:
    """The parameters whose values the kept gradients read once more when they are contracted."""
    found: dict[Parameter, None] = {}
    for batch in step.batches:
        for weight, factors in batch.kept:
            if isinstance(factors, Directional) or weight.derived:
                found.update(dict.fromkeys(weight.params))
    return list(found)


def bytes_of(value: object) -> int:
    """Memory of the tensors in a value: a tensor, factored gradients, or a sequence or mapping of such."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(bytes_of(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return sum(bytes_of(part) for part in value)
    if isinstance(value, (Dense, Directional, Lookup, Outer)):
        return sum(bytes_of(part) for part in vars(value).values())
    return 0
