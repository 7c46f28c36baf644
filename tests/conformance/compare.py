"""The one comparison: per-sample gradients of a capture against plain autograd on single samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference.forms import FORMS, forced
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_leaves, tree_map

from assay.capture import Capture, Coverage, Weights, constants_of, contract
from assay.capture.check import check_capture
from assay.capture.fallback import Boundary

TARGETS = 2


@dataclass
class Outcome:
    """Largest relative errors over parameters: scores against single samples, and their sum against `.grad`.

    `forms` are the scores and the kept gradients again, by every form of the contraction.
    """

    samples: float
    total: float
    deferred: float
    forms: float
    where: str
    status: dict[str, str]


def per_sample_outputs(out: Any, batch: int) -> list[Tensor]:
    """The float outputs with one row per sample."""
    if hasattr(out, "to_tuple"):
        out = out.to_tuple()
    return [
        x
        for x in tree_leaves(out, is_leaf=lambda v: isinstance(v, Tensor))
        if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad and x.dim() and len(x) == batch
    ]


def row(inputs: Any, i: int, batch: int) -> Any:
    """Sample i alone."""
    return tree_map(
        lambda x: x[i : i + 1] if isinstance(x, Tensor) and x.dim() and len(x) == batch else x, inputs
    )


def reference(
    model: Module, inputs: Mapping[str, Any], batch: int, params: Sequence[Parameter]
) -> tuple[list[int], list[Tensor], list[list[Tensor]]]:
    """Which outputs count, their random cotangents, and every sample's gradients, by autograd.

    Of the sample alone in the model; where the model then computes something else, of its outputs alone.
    """
    outputs = forward(model, inputs, batch)
    alone = [forward(model, row(inputs, i, batch), 1) for i in range(batch)]
    chosen = [
        k
        for k, x in enumerate(outputs)
        if all(len(one) == len(outputs) and one[k].shape[1:] == x.shape[1:] for one in alone)
    ]
    assert chosen, "the model has no output with one row per sample"
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(outputs[k].shape, generator=generator, dtype=outputs[k].dtype) for k in chosen]
    if all(_close(outputs[k][i : i + 1], one[k]) for i, one in enumerate(alone) for k in chosen):
        singly = [
            _gradients([one[k] for k in chosen], [seed[i : i + 1] for seed in seeds], params)
            for i, one in enumerate(alone)
        ]
        whole = _gradients([outputs[k] for k in chosen], seeds, params)
        apart = [
            torch.stack(g).sum(0) - total for g, total in zip(zip(*singly, strict=True), whole, strict=True)
        ]
        if max(float(x.norm()) for x in apart) <= 1e-10 * max(float(x.norm()) for x in whole):
            return chosen, seeds, singly
    # the model computes a sample otherwise when it is alone (masks, random numbers, overwhelming rounding)
    together = []
    for i in range(batch):
        outputs = forward(model, inputs, batch)
        rows = [outputs[k][i : i + 1] for k in chosen]
        together.append(_gradients(rows, [seed[i : i + 1] for seed in seeds], params))
    return chosen, seeds, together


def forward(model: Module, inputs: Any, batch: int) -> list[Tensor]:
    """The outputs, with the same random numbers every time."""
    torch.manual_seed(0)
    return per_sample_outputs(model(**inputs), batch)


def _gradients(outputs: list[Tensor], seeds: list[Tensor], params: Sequence[Parameter]) -> list[Tensor]:
    total = sum((x * seed).sum() for x, seed in zip(outputs, seeds, strict=True))
    found = torch.autograd.grad(total, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).norm()) <= 1e-6 * float(a.norm()) + 1e-12


def compare(model: Module, inputs: Mapping[str, Any], batch: int = 3, *, strict: bool = False) -> Outcome:
    """Run the capture on the model as a run does, and measure how far it is from autograd on single samples.

    The model is first put to the start-up check, which leaves what no rule covers to a fallback.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    weights = Weights(named, {p: k for k, p in enumerate(params)}, constants_of(model))
    chosen, seeds, gradients = reference(model, inputs, batch, params)
    generator = torch.Generator().manual_seed(3)
    directions = {p: torch.randn(TARGETS, *p.shape, generator=generator, dtype=p.dtype) for p in params}
    truth = torch.stack(
        [
            torch.stack([directions[p].reshape(TARGETS, -1) @ g.flatten() for g in per_param], 1)
            for p, per_param in zip(params, zip(*gradients, strict=True), strict=True)
        ]
    )  # [parameters, targets, B]
    size = torch.stack([torch.stack([g.norm() for g in row]).norm() for row in zip(*gradients, strict=True)])
    size = size + 1e-6 * size.max()

    coverage = Coverage(weights.names)
    check_capture(model, (), inputs, weights, batch, coverage)

    def run(**options: Any) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        along = None if options else directions
        capture = Capture(weights, batch, along, strict=strict, coverage=coverage, **options)
        with Boundary(model, weights, capture) as boundary, capture:
            outputs = forward(model, inputs, batch)
            loss = sum((outputs[k] * seed).sum() for k, seed in zip(chosen, seeds, strict=True))
            assert isinstance(loss, Tensor)
            loss.backward()
        with torch.no_grad():
            scores = boundary.finish()
            assert scores is not None
            if capture.kept:
                scores = scores + contract(capture.kept, directions, scores)
        return scores, [torch.zeros_like(p) if p.grad is None else p.grad for p in params]

    scores, grads = run()
    total = torch.stack(
        [directions[p].reshape(TARGETS, -1) @ g.flatten() for p, g in zip(params, grads, strict=True)]
    )

    def apart(found: Tensor) -> Tensor:
        return (found - truth).abs().amax((1, 2)) / size

    errors = apart(scores)
    sums = (scores.sum(2) - total).abs().amax(1) / size
    later, _ = run(keep=params)
    forms: list[Tensor] = []
    for form in FORMS:
        with forced(form):
            forms += [apart(run(**options)[0]).max() for options in ({}, {"keep": params})]
    worst = errors.nan_to_num(float("inf")).argmax()
    status = dict(coverage.frame().select("parameter", "status").iter_rows())
    return Outcome(
        float(errors.max()),
        float(sums.max()),
        float(apart(later).max()),
        float(torch.stack(forms).max()),
        named[worst][0],
        status,
    )
