"""What a configuration will cost, before anything is spent: its own data, tokenizer, model and device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import nn

from assay import plan
from assay.snapshots import snapshot_settings
from assay.train.batches import Batch, batch_rows, make_batch
from assay.train.config import Config
from assay.train.loop import Setup, prepare
from assay.train.model import token_mean_loss
from assay.train.overhead import now

__all__ = ["Estimate", "estimate"]

TRIES = 3


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Args:
        parameters: of the model.
        steps: optimizer steps.
        samples: documents, or parts of documents, that are trained on, repetitions counted.
        tokens: of all batches, padding included.
        speed: operations per second that the device was seen to sustain (or was said to).
        training: the training itself.
        methods: what each method adds to it.
    """

    parameters: int
    steps: int
    samples: int
    tokens: int
    speed: float
    training: plan.Work
    methods: Mapping[str, plan.Work]


def estimate(config: Config, speed: float | None = None) -> Estimate:
    """Read the data, make tokenizer and model, and count; nothing is trained and nothing is written.

    Args:
        config: of the run.
        speed: operations per second of the device that the run is meant for; by default that of this one, from a
            few forward and backward passes of the model.

    Raises:
        InputError: the data, the model or the device cannot be used.
    """
    setup = prepare(config)
    batches = list(
        batch_rows(setup.rows, config.train.batch_size, torch.Generator().manual_seed(config.seed))
    )
    groups = -(-len(batches) // config.train.accumulate)  # optimizer steps of an epoch
    share = setup.steps / groups  # epochs that are trained
    padded = [len(rows) * (max(len(row.tokens) for row in rows) - 1) for rows in batches]
    samples, tokens = round(len(setup.rows) * share), round(sum(padded) * share)
    context = max(1, round(tokens / samples))
    shape = plan.shape_of(setup.model, _attention(setup.model, config))
    width = next(setup.model.parameters()).element_size()
    micro = min(config.train.batch_size, samples)
    run = plan.Training(tokens, context, -(-samples // setup.steps), width, micro=micro)
    if speed is None:
        first = make_batch(batches[0]).to(setup.device)
        speed = _measured(setup, first, 3 * shape.forward(first.tokens.shape[1]) * first.tokens.numel())
    return Estimate(
        shape.parameters,
        setup.steps,
        samples,
        tokens,
        speed,
        plan.training(shape, run),
        _methods(setup, shape, run),
    )


def _methods(setup: Setup, shape: plan.Shape, run: plan.Training) -> dict[str, plan.Work]:
    """The configured way of valuing first, then what else could be asked for."""
    held_out = sum(batch.tokens.numel() for batch in setup.targets.values())
    rows = held_out / (len(setup.targets) * run.context)
    chosen = setup.config.attribution
    paths = dict.fromkeys([chosen.path, "left", "trapezoid", "simpson", "hessian"])
    targets, form = len(setup.targets), chosen.target_gradient
    found = {
        f"in-run values, {path}": plan.in_run(shape, run, targets, rows, path, False, form)
        for path in paths
        if (path, form) != ("hessian", "factors")  # refused
    }
    for other in ("bfloat16", "cpu", "factors"):
        if other != form and (chosen.path, other) != ("hessian", "factors"):
            work = plan.in_run(shape, run, targets, rows, chosen.path, False, other)
            found[f"in-run values, {chosen.path}, target_gradient: {other}"] = work
    found["embeddings, rank 16"] = plan.embeddings(shape, run, 16)
    found["index of the result, rank 64"] = plan.index(shape, run.tokens, run.context, 64, width=2)
    settings = snapshot_settings(setup.config.attribution.snapshots)
    found["adjoint, one target, with its snapshots"] = plan.adjoint(shape, run, 1, settings)
    return found


def _attention(model: nn.Module, config: Config) -> tuple[int, int]:
    if config.model.name == "gpt":
        return config.model.layers, config.model.width
    sizes = getattr(model, "config", None)
    return getattr(sizes, "num_hidden_layers", 0), getattr(sizes, "hidden_size", 0)


def _measured(setup: Setup, batch: Batch, operations: float) -> float:
    """Operations per second of the fastest of a few passes; gradients are gone afterwards."""

    def seconds(work: Callable[[], object]) -> float:
        started = now(setup.device)
        work()
        return now(setup.device) - started

    def step() -> None:
        token_mean_loss(setup.model, batch).backward()  # type: ignore[no-untyped-call]
        setup.model.zero_grad()

    step()
    best, until = inf, time.perf_counter() + 20
    for _ in range(TRIES):
        best = min(best, seconds(step))
        if time.perf_counter() > until:
            break
    return operations / best
