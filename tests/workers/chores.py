"""Tasks for workers: functions of a module, so that any process finds them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.errors import InputError
from assay.evaluate.subsets import SubsetTraining, draw_subsets, subset_truth
from assay.workers import Workers


def square(x: int) -> int:
    return x * x


def refuse(x: int) -> int:
    if x == 2:
        raise InputError(f"{x} is not wanted.")
    return x


def die_once(x: int, folder: str) -> int:
    """Killed by the system at the first try of every third task."""
    mark = Path(folder) / str(x)
    if x % 3 == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def die(x: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def noted(x: int, folder: str) -> int:
    """Leave a file for every task that was begun."""
    (Path(folder) / str(x)).touch()
    time.sleep(0.01)
    return x


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, generator=generator), torch.randint(3, (4,), generator=generator)


def loss_fn(model: nn.Module, batch: object) -> Tensor:
    x, y = batch  # type: ignore[misc]
    return F.cross_entropy(model(x), y)


def build(out: Path | None, workers: Workers | None) -> assay.Index:
    examples = [(list(range(4 * n, 4 * n + 4)), batch(n)) for n in range(12)]
    projection = assay.Projection(rank=2)
    return assay.Index.build(
        net(), examples, loss_fn, out=out, projection=projection, dtype="fp32", shard=8, workers=workers
    )


def losses(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(rows[0]), rows[1], reduction="none")


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def truth(workers: Workers | None, cache: Path | None = None) -> Tensor:
    x, y = (torch.cat(parts) for parts in zip(*(batch(n) for n in range(4)), strict=True))
    kept, training = draw_subsets(16, 6), SubsetTraining(sgd, epochs=2, batch=4)
    return subset_truth(
        net,
        losses,
        (x, y),
        batch(99),
        training,
        kept=kept,
        seeds=(0, 1),
        at_once=2,
        cache=cache,
        workers=workers,
    ).losses
