"""Work handed to one other thread, in order, through a bounded queue: files are written while rows are computed."""

from __future__ import annotations

from collections.abc import Callable
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any

__all__ = ["Background"]


class Background:
    """Calls `call` in a thread of its own, one call after the other.

    An error of a call is raised at the next `put`, or at the end of the context; the calls behind it are not made.

    Args:
        call: what is done.
        waiting: calls that may wait; `put` blocks until there is room, so that memory stays bounded.

    Example:
        >>> done = []
        >>> with Background(done.append) as background:
        ...     background.put("first")
        ...     background.put("second")
        >>> done
        ['first', 'second']
    """

    def __init__(self, call: Callable[..., object], waiting: int = 2) -> None:
        self._call = call
        self._queue: Queue[tuple[Any, ...] | None] = Queue(waiting)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, name="assay-background", daemon=True)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def put(self, *args: object) -> None:
        """Queue a call.

        Raises:
            BaseException: what an earlier call raised.
        """
        self._raise()
        self._queue.put(args)

    def wait(self) -> None:
        """Until all calls are made.

        Raises:
            BaseException: what one of them raised.
        """
        self._queue.join()
        self._raise()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for all calls; raise what one of them raised, unless another error is on its way."""
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _work(self) -> None:
        while (args := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._call(*args)
                except BaseException as error:  # handed over to the other thread, whatever it is
                    self._error = error
            self._queue.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
