"""A run of ``assay train`` once more: its model, its order of the data and its loss, for the adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from torch import Tensor, nn
from torch.optim import Optimizer

import assay
from assay.errors import InputError
from assay.replay import AdjointOptions
from assay.train.config import Config
from assay.train.loop import groups, make_optimizer, prepare
from assay.train.model import token_mean_loss

__all__ = ["Rerun", "adjoint_of_run", "rerun"]


@dataclass(frozen=True)
class Rerun:
    """What `Ledger.adjoint` asks for, of a run made by ``assay train``.

    Args:
        model: of the run's architecture.
        optimizer: with the run's groups.
        batches_of_step: the micro-batches of a step.
        targets: the run's own.
    """

    model: nn.Module
    optimizer: Optimizer
    batches_of_step: Callable[[int], Sequence[tuple[Any, Any]]]
    targets: dict[str, assay.Target]


def rerun(ledger: assay.Ledger) -> Rerun:
    """Prepare the run again from the configuration that it kept.

    Raises:
        InputError: it was not made by ``assay train``, or its data cannot be read any more.
    """
    kept = ledger.info.get("config")
    if not isinstance(kept, dict):
        raise InputError(
            f"{ledger.path} was not made by `assay train`, so its data and their order are not known: call "
            "Ledger.adjoint from Python with your own model, optimizer and batches."
        )
    setup = prepare(Config.model_validate(kept))
    optimizer, _ = make_optimizer(setup.model, setup.config.train, setup.steps)
    order = list(zip(range(setup.steps), groups(setup), strict=False))
    targets = {name: assay.Target([batch], token_mean_loss) for name, batch in setup.targets.items()}
    return Rerun(setup.model, optimizer, lambda step: order[step][1], targets)


def adjoint_of_run(
    ledger: assay.Ledger, names: Sequence[str], options: AdjointOptions
) -> tuple[Tensor, pl.DataFrame, dict[str, assay.Target]]:
    """The exact values of some targets.

    Args:
        ledger: of a run made by ``assay train`` with snapshots.
        names: of its targets; none for all.
        options: of `Ledger.adjoint`.

    Returns:
        `[targets, rows]`; a frame with a row per document: `id` and a column per target, its values summed over the
        steps that were visited; and the targets by name.

    Raises:
        InputError: a target that the run does not have; the replay is not the run.
    """
    again = rerun(ledger)
    unknown = sorted(set(names) - set(again.targets))
    if unknown:
        raise InputError(
            f"the run has no target {unknown[0]!r}: choose among {', '.join(map(repr, again.targets))}"
        )
    queries = {name: again.targets[name] for name in (names or again.targets)}
    values = ledger.adjoint(
        again.model, again.optimizer, again.batches_of_step, token_mean_loss, queries, **options
    )
    columns = {name: row.double().tolist() for name, row in zip(queries, values, strict=True)}
    rows = ledger.rows.with_columns(pl.Series(name, column) for name, column in columns.items())
    seen = rows.filter(pl.all_horizontal(pl.col(list(columns)).is_not_nan()))
    return values, seen.group_by("id", maintain_order=True).agg(pl.col(list(columns)).sum()), queries
