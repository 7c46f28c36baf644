"""A request to end: schedulers send SIGTERM some seconds before they kill a process."""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["Termination"]


class Termination:
    """Turns SIGTERM into `SystemExit`, so that `with` blocks are left and what they hold is written.

    Only where the process would die of it: a handler of somebody else's own stays.
    """

    def __init__(self) -> None:
        self._installed = False

    def install(self) -> None:
        """From now on; does nothing outside the main thread, in which alone Python hears signals."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _leave)
            self._installed = True

    def remove(self) -> None:
        """As it was before."""
        if self._installed and signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._installed = False


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
