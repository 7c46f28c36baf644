"""Ray: the work after training on a cluster, with the same tasks as on one machine's processes.

    import ray
    from assay.integrations.ray import RayWorkers

    ray.init("auto")
    embeddings = ledger.embeddings(segments=64, workers=RayWorkers())

The folders that tasks read and write must be reachable from every node: shared, or in object storage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from assay.errors import AssayError, InputError
from assay.workers import Task

__all__ = ["RayWorkers"]

R = TypeVar("R")


class RayWorkers:
    """Workers of a Ray cluster; a task of a node that is lost is done again on another.

    Args:
        number: tasks at a time; by default as many as the cluster has room for.
        retries: how often a task whose worker died is given to another.
        **resources: of one task, as `ray.remote` takes them (`num_cpus=2`, `num_gpus=1`, `memory=…`).

    Raises:
        InputError: Ray is not installed or not started, or there is no room for a single task.
    """

    def __init__(self, number: int | None = None, retries: int = 3, **resources: Any) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError("RayWorkers needs Ray: pip install 'assay[ray]'") from error
        if not ray.is_initialized():
            raise InputError("RayWorkers: Ray is not started; call ray.init() first.")
        self._ray: Any = ray
        self.retries, self._resources = retries, {"num_cpus": 1, **resources}
        self._number = self._room() if number is None else number
        if self._number < 1:
            raise InputError(
                f"RayWorkers: the cluster has no room for a task with {self._resources}; ask for less."
            )

    @property
    def number(self) -> int:
        """How many tasks are worked on at a time."""
        return self._number

    def run(self, function: Callable[..., R], tasks: Iterable[Task]) -> Iterator[R]:
        """See `assay.workers.Workers.run`."""
        remote = self._ray.remote(**self._resources, max_retries=self.retries)(function)
        waiting, flying = iter(tasks), deque[Any]()
        try:
            while True:
                for task in islice(waiting, self._number - len(flying)):
                    flying.append(remote.remote(*task))
                if not flying:
                    return
                yield self._result(function, flying[0])
                flying.popleft()
        finally:
            for reference in flying:
                self._ray.cancel(reference, force=True)

    def _result(self, function: Callable[..., R], reference: Any) -> R:
        try:
            result: R = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except self._ray.exceptions.RayError as error:
            raise AssayError(
                f"a worker of the cluster died time and again at the same task ({function.__name__}): look for its "
                "memory limit, or give a task more resources."
            ) from error
        return result

    def _room(self) -> int:
        """Tasks that fit into the whole cluster."""
        there = self._ray.cluster_resources()
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        needs = {names.get(name, name): size for name, size in self._resources.items() if size}
        return int(min(there.get(name, 0) // size for name, size in needs.items()))
