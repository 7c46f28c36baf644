"""The training loop that every comparison shares, with and without assay."""

# mypy: allow-untyped-calls
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from reference.cases import Batch, Case
from reference.dense import Id, MicroBatch, Snapshot

Plan = Sequence[Sequence[MicroBatch]]
"""For each optimizer step its micro-batches."""


def plan(
    case: Case,
    steps: int = 3,
    sizes: Sequence[int] = (4,),
    dtype: torch.dtype = torch.float64,
    ids: Callable[[int], Id] = int,
) -> Plan:
    """`steps` steps of one micro-batch per entry of `sizes`; `ids` turns a running number into an id."""
    result: list[list[MicroBatch]] = []
    drawn = 0
    for step in range(steps):
        micro_batches: list[MicroBatch] = []
        for m, size in enumerate(sizes):
            batch = case.batch(size, seed=1000 + 10 * step + m, dtype=dtype)
            micro_batches.append(([ids(drawn + i) for i in range(size)], batch))
            drawn += size
        result.append(micro_batches)
    return result


def train(
    model: nn.Module,
    optimizer: Optimizer,
    plan: Plan,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    *,
    clip: float | None = None,
    record: Callable[[Sequence[Id]], AbstractContextManager[Any]] | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    scale: float = 1.0,
) -> None:
    """A user's loop: accumulate, unscale, clip, step, zero.

    Args:
        model: trained in place.
        optimizer: of the model.
        plan: the data.
        loss: of a micro-batch; each is divided by their number in the step.
        clip: largest norm of the gradient.
        record: `run.step` of assay, or nothing.
        before_step: called with the step's number right before `optimizer.step()`.
        after_step: called with the step's number after it.
        scale: loss scale, multiplied in before the backward pass and divided out before clipping.
    """
    for number, micro_batches in enumerate(plan):
        for ids, batch in micro_batches:
            with record(ids) if record else nullcontext():
                (loss(model, batch) / len(micro_batches) * scale).backward()
        if scale != 1.0:
            for param in model.parameters():
                if param.grad is not None:
                    param.grad.div_(scale)
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        if before_step:
            before_step(number)
        optimizer.step()
        optimizer.zero_grad()
        if after_step:
            after_step(number)


def snapshot(
    case: Case,
    model: nn.Module,
    optimizer: Optimizer,
    build_optimizer: Callable[[nn.Module], Optimizer],
    micro_batches: Sequence[MicroBatch],
) -> Snapshot:
    """A float64 copy of model, optimizer and gradient, free of whatever hangs on the originals."""
    fresh = case.model(torch.float64)
    fresh.load_state_dict(model.state_dict())
    copied = build_optimizer(fresh)
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    double = [(ids, widened(batch)) for ids, batch in micro_batches]
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    received = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in owned]
    return Snapshot(fresh, copied, double, [g.double() for g in received])


def widened(batch: Batch) -> Batch:
    """The batch as it is, in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
