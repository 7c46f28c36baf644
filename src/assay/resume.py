"""At which optimizer step a resumed run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from assay.distributed import OneProcess
from assay.errors import AssayWarning, InputError
from assay.optimizers import OptimizerModel
from assay.optimizers.scalars import number
from assay.store.files import local_path
from assay.store.folder import gradients_folder
from assay.store.resume import account_of, overrule_others

__all__ = ["Resume", "first_step"]

Resume = bool | int | Mapping[str, Any]


def first_step(
    resume: Resume, out: str | Path | None, optimizer: OptimizerModel, processes: OneProcess
) -> int | None:
    """The number of the next optimizer step, in all processes; None for a new run.

    Args:
        resume: of `Run`: what `Run.state_dict` gave, a step, or True to find it by the optimizer's own count.
        out: the run's folder.
        optimizer: its state is the checkpoint's.
        processes: that train together.

    Raises:
        InputError: there is no folder, or no way to tell the step.
        StoreError: what the folder holds is damaged.
    """
    if resume is False:
        return None
    if out is None:
        raise InputError("Run(resume=...): a run in memory ends with its process; give the folder out=.")
    step = processes.together(lambda: _found(resume, out, optimizer) if processes.rank == 0 else None)
    agreed = int(processes.agreed(-1 if step is None else step))
    if agreed >= 0 and processes.rank == 0:
        overrule_others(local_path(out), agreed, processes.size)
    return None if agreed < 0 else agreed


def _found(resume: Resume, out: str | Path, optimizer: OptimizerModel) -> int | None:
    account = account_of(local_path(out))
    booked, last = ([], -1) if account is None else _booked(account, local_path(out))
    given = resume.get("step") if isinstance(resume, Mapping) else resume
    if isinstance(given, bool):
        if account is None:
            return None
        given = _step_after(_taken(optimizer, sure=not booked), booked)
    if type(given) is not int or given < 0:
        raise InputError(
            f"Run(resume={resume!r}) names no step; give True, a step, or what run.state_dict() gave."
        )
    if given > last + 1:
        warnings.warn(
            f"Run(resume=...): training goes on at step {given}, but the last step that {out} holds is "
            f"{last if last >= 0 else 'none'}: the values in between are lost; save run.state_dict() with every "
            "checkpoint, which writes all that was booked before it.",
            AssayWarning,
            stacklevel=4,
        )
    return given


def _booked(account: pl.DataFrame, out: Path) -> tuple[list[int], int]:
    """The steps that moved the weights, and the last one of which everything is there (-1 for none).

    A run that only records gradients has no account; of one that does both, neither may be behind.
    """
    booked: list[int] = account.filter(~account["skipped"])["step"].to_list()
    last = int(account["step"][-1]) if len(account) else -1
    if not (out / "embeddings").is_dir():
        return booked, last
    from assay.embedding.resume import recorded_steps

    recorded = recorded_steps(gradients_folder(out))
    end = recorded[-1] if recorded else -1
    if not len(account):
        return recorded, end
    return booked, min([last, *(step - 1 for step in booked if step > end)])


def _taken(optimizer: OptimizerModel, sure: bool) -> int:
    """How many steps the optimizer says that it has taken; `sure` that it is none where it does not say."""
    states = [optimizer.optimizer.state.get(p, {}) for p in optimizer.params()]
    counts = [int(float(number(state["step"]))) for state in states if "step" in state]
    fresh = not any(states) and any(optimizer.momentum_decay(p) for p in optimizer.params())
    if not counts and not fresh and not sure and not optimizer.preconditioned:
        raise InputError(
            f"Run(resume=True): {type(optimizer.optimizer).__name__} does not count its steps; save run.state_dict() "
            "with the checkpoint and pass it as resume=."
        )
    return max(counts, default=0)


def _step_after(taken: int, booked: list[int]) -> int:
    """The run's number of the step after so many that moved the weights; a skipped step has a number, too.

    Example:
        >>> _step_after(2, [0, 2, 3]), _step_after(0, [0, 2, 3]), _step_after(4, [0, 2, 3])
        (3, 0, 5)
    """
    if taken <= len(booked):
        return booked[taken - 1] + 1 if taken else 0
    return (booked[-1] if booked else -1) + 1 + taken - len(booked)
