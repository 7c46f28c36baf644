"""Work after training, on several processes: the same tasks on this machine's cores or on a cluster.

A task is a function of a module and its arguments, and leaves what matters in a folder or in its result. A worker that
dies takes nothing with it but its task, which another one does again.

`Local` is the process pool of this machine; `assay.integrations.ray.RayWorkers` is the same over a cluster.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Protocol, TypeVar

from assay.errors import AssayError, InputError

__all__ = ["Local", "Workers"]

R = TypeVar("R")
Task = tuple[Any, ...]


class Workers(Protocol):
    """Processes that do tasks."""

    @property
    def number(self) -> int:
        """How many tasks are worked on at a time."""
        ...

    def run(self, function: Callable[..., R], tasks: Iterable[Task]) -> Iterator[R]:
        """`function(*task)` of every task, in the order of the tasks.

        Tasks are taken from the iterable as workers become free, so that neither tasks nor results pile up.

        Raises:
            AssayError: a task's worker died time and again.
            Exception: what the function raised.
        """
        ...


class Local:
    """Processes of this machine.

    Args:
        number: of processes; by default one per core.
        retries: how often a task whose process died is given to another.

    Raises:
        InputError: a number below 1.

    Example:
        >>> list(Local(1).run(pow, [(2, 3), (3, 2)]))
        [8, 9]
    """

    def __init__(self, number: int | None = None, retries: int = 3) -> None:
        self._number = (os.cpu_count() or 1) if number is None else number
        self.retries = retries
        if self._number < 1:
            raise InputError(f"Local(number={number!r}): there must be at least one process.")

    @property
    def number(self) -> int:
        """How many processes there are."""
        return self._number

    def run(self, function: Callable[..., R], tasks: Iterable[Task]) -> Iterator[R]:
        """See `Workers.run`; with one process, the work is done in this one."""
        if self._number == 1:
            for task in tasks:
                yield function(*task)
            return
        waiting = iter(tasks)
        flying: deque[tuple[Future[R], Task, int]] = deque()
        pool = self._pool()
        try:
            while True:
                for new in islice(waiting, self._number - len(flying)):
                    flying.append((pool.submit(function, *new), new, 0))
                if not flying:
                    return
                future = flying[0][0]
                try:
                    result = future.result()
                except BrokenProcessPool:  # one died, and with it all that were at work
                    pool.shutdown(wait=False, cancel_futures=True)
                    pool = self._pool()
                    flying = deque(self._again(pool, function, *entry) for entry in flying)
                    continue
                flying.popleft()
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _again(
        self, pool: ProcessPoolExecutor, function: Callable[..., R], future: Future[R], task: Task, tried: int
    ) -> tuple[Future[R], Task, int]:
        """The entry, with its task given to a new process unless its result is there."""
        if future.done() and not future.cancelled() and future.exception() is None:
            return future, task, tried
        if tried == self.retries:
            raise AssayError(
                f"a process died {tried + 1} times at the same task ({function.__name__}): look for its memory limit, "
                "or use fewer processes."
            )
        return pool.submit(function, *task), task, tried + 1

    def _pool(self) -> ProcessPoolExecutor:
        threads = max(1, (os.cpu_count() or 1) // self._number)
        return ProcessPoolExecutor(
            self._number,
            mp_context=multiprocessing.get_context(
                "spawn"
            ),  # a fork would inherit torch's threads in any state
            initializer=_limit_threads,
            initargs=(threads,),
        )


def _limit_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)
