"""One comparison for all tests: the ledger of a run against the dense reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import assay
from reference.cases import Case, Loss
from reference.dense import Snapshot, Step, Target, values
from reference.loop import Plan, snapshot, train
from reference.settings import BuildOptimizer


def valuation(targets: Mapping[str, Target], memory: str = "keep") -> assay.InRunShapley:
    """First-order in-run values for these targets."""
    return assay.InRunShapley(
        targets={name: assay.Target(target.batches, target.loss) for name, target in targets.items()},
        path="left",
        momentum="instant",
        memory=memory,
    )


def one_target(case: Case, loss: Loss, size: int, dtype: torch.dtype = torch.float64) -> dict[str, Target]:
    """A target "held_out" of one batch."""
    return {"held_out": Target([case.batch(size, seed=7, dtype=dtype)], loss)}


def recorded(ledger: assay.Ledger, target: str = "held_out") -> list[Step]:
    """The ledger's rows, by step."""
    frame = ledger.steps(target)
    assert frame.columns == ["step", "id", "value"]
    steps = frame.partition_by("step", maintain_order=True)
    return [list(step.select("id", "value").iter_rows()) for step in steps]


def relative_error(actual: list[Step], expected: list[Step]) -> float:
    """Largest absolute error over the largest absolute value; both must value the same samples in order."""
    assert [[i for i, _ in step] for step in actual] == [[i for i, _ in step] for step in expected]
    found, truth = (
        torch.tensor([v for step in steps for _, v in step]).double() for steps in (actual, expected)
    )
    assert truth.abs().max() > 0
    return float((found - truth).abs().max() / truth.abs().max())


def snapshots_of_plain_training(
    case: Case, loss: Loss, build: BuildOptimizer, data: Plan, clip: float | None = None
) -> list[Snapshot]:
    """What each step starts from, when assay is nowhere near."""
    model = case.model()
    optimizer = build(model)
    result: list[Snapshot] = []
    train(
        model,
        optimizer,
        data,
        loss,
        clip=clip,
        before_step=lambda number: result.append(snapshot(case, model, optimizer, build, data[number])),
    )
    return result


def valued(
    case: Case,
    loss: Loss,
    build: BuildOptimizer,
    data: Plan,
    targets: Mapping[str, Target],
    clip: float | None = None,
    memory: str = "keep",
    **options: Any,
) -> assay.Ledger:
    """The ledger of the same training with assay; `options` go to `assay.Run`."""
    model = case.model()
    optimizer = build(model)
    run = assay.Run(model, optimizer, out=None, methods=[valuation(targets, memory)], **options)
    train(model, optimizer, data, loss, clip=clip, record=run.step)
    run.close()
    return run.ledger


def check(
    case: Case,
    loss: Loss,
    build: BuildOptimizer,
    data: Plan,
    targets: Mapping[str, Target],
    clip: float | None = None,
    memory: str = "keep",
    **options: Any,
) -> None:
    """Every value of every target is the dense one."""
    snapshots = snapshots_of_plain_training(case, loss, build, data, clip)
    expected = values(snapshots, loss, targets, clip=clip, tolerance=case.tolerance)
    ledger = valued(case, loss, build, data, targets, clip, memory, **options)
    for name in targets:
        assert relative_error(recorded(ledger, name), expected[name]) <= case.tolerance
