"""What snapshots and the adjoint will take of disk and memory, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch.nn import Module
from torch.optim import Optimizer

from assay.replay.flat import Flat
from assay.replay.optimizers import adjoint_of
from assay.snapshots import Snapshots

__all__ = ["Plan", "plan_of"]


@dataclass(frozen=True)
class Plan:
    """Bytes.

    Args:
        snapshots: the steps whose snapshots remain.
        disk: of the snapshots.
        kept: what the replay of the longest segment puts aside.
        adjoints: of weights and optimizer's state, and what one step needs beside them.
        borrowed: copies of the caller's model and optimizer, and a snapshot as it is read.
    """

    snapshots: tuple[int, ...]
    disk: int
    kept: int
    adjoints: int
    borrowed: int

    @property
    def memory(self) -> int:
        """Beyond the model, its optimizer and the activations of a micro-batch."""
        return self.kept + self.adjoints + self.borrowed


def plan_of(
    model: Module,
    optimizer: Optimizer,
    steps: int,
    queries: int = 1,
    settings: Snapshots | None = None,
    clipped: bool = True,
) -> Plan:
    """Disk and memory of the snapshots of a run and of its adjoint.

    Activations are not in it: the double backward pass holds about four times those of a training step.

    Args:
        model: that is trained.
        optimizer: that trains it; it need not have stepped.
        steps: of the run.
        queries: carried back together.
        settings: of the snapshots.
        clipped: whether gradients are clipped.

    Raises:
        UnsupportedOptimizerError: its adjoint is not known.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(99, 10)
        >>> plan = plan_of(model, torch.optim.AdamW(model.parameters()), steps=100)
        >>> plan.snapshots, plan.disk
        ((0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 100), 168000)
        >>> plan.kept                                               # 8 steps of w, m, v and g
        128000
    """
    adjoint = adjoint_of(optimizer)
    flat = Flat(model, optimizer)
    vector = flat.total * flat.params[0].element_size()
    held = [group for group in optimizer.param_groups if group.get("momentum", 1)]
    buffers = len(adjoint.buffers) if held else 0
    others = sum(p.numel() * p.element_size() for p in model.parameters()) - vector
    others += sum(b.numel() * b.element_size() for b in model.buffers())
    each = (1 + buffers) * vector + others
    found = (settings or Snapshots()).kept(steps, each)
    longest = max((b - a for a, b in pairwise(found)), default=0)
    stash = 1 + len(adjoint.reads) + (adjoint.reads_gradient or clipped)
    return Plan(
        snapshots=found,
        disk=len(found) * each,
        kept=longest * stash * vector,
        adjoints=queries * (1 + len(adjoint.buffers) + 4) * vector,
        borrowed=(2 + 2 * buffers) * vector,
    )
