"""Collectives over the processes of one group, and errors that all of them hear of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from assay.distributed.processes import OneProcess
from assay.errors import AssayError

__all__ = ["Group"]

Result = TypeVar("Result")
BUCKET = 1 << 23  # entries in one message


class Group(OneProcess):
    """Several processes with one process group.

    Args:
        module: the model without its wrapper.
        group: the processes that train together.
        device: where collectives find their tensors.
    """

    def __init__(self, module: torch.nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(module)
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def share(self) -> float:
        """The mean over the processes is taken."""
        return 1 / self.size

    @property
    def hint(self) -> str:
        """The wrapper is known."""
        return ""

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def all(self, flag: bool) -> bool:
        """Whether it holds in every process."""
        return bool(self.total(torch.tensor(float(flag), device=self.device)) == self.size)

    def agreed(self, x: int) -> int:
        """The number that the first process has."""
        own = torch.tensor(x if self.rank == 0 else 0, dtype=torch.int64, device=self.device)
        return int(self.total(own))

    def together(self, work: Callable[[], Result]) -> Result:
        """Run it everywhere; the first error is raised in all processes.

        Raises:
            AssayError: what failed here, or what failed in another process.
        """
        failed: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failed = error
        self._compare(failed)
        return result

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """The first process, then, if that did not fail, the others."""
        failed: Exception | None = None
        for mine in (self.rank == 0, self.rank > 0):
            try:
                if mine:
                    result = work()
            except Exception as error:
                failed = error
            self._compare(failed)
        return result

    def _compare(self, failed: Exception | None) -> None:
        if not self.all(failed is None):
            texts: list[str | None] = [None] * self.size
            own = None if failed is None else f"{type(failed).__name__}: {failed}"
            dist.all_gather_object(texts, own, group=self.group)
            if failed is not None:
                raise failed
            rank, text = next((r, t) for r, t in enumerate(texts) if t is not None)
            raise AssayError(f"process {rank} of {self.size} stopped with {text}: look at its output")

    def total_of_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the processes, many in one message."""
        totals: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            totals += [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)]
        return totals


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, neighbours of one dtype together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
