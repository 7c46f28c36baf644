"""One process at a time writes into a folder."""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path

from assay.errors import StoreError

if sys.platform != "win32":
    import fcntl

__all__ = ["WriteLock"]

_held: dict[
    tuple[int, int], list[int]
] = {}  # (device, inode) of a folder → its descriptor, how many hold it here


class WriteLock:
    """Keeps other processes from writing into a folder, until `release` or the end of this process.

    The lock is the operating system's (`flock` on the folder itself), so that a process that is killed leaves none
    behind. It is the process that holds it: a second one in the same process is given at once, as after a training
    loop that was interrupted in a notebook.

    Args:
        folder: that is there.

    Attributes:
        sure: whether this file system has such locks; where it has none, nobody is kept out.

    Raises:
        StoreError: another process writes there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock, again = WriteLock(Path(folder)), WriteLock(Path(folder))
        ...     lock.release(), again.release()
        (None, None)
    """

    def __init__(self, folder: Path) -> None:
        key = _taken(folder)
        self.sure = key is not None
        self._let_go = weakref.finalize(self, _give_back, key)

    def release(self) -> None:
        """Let others write; doing it again does nothing."""
        self._let_go()


def _taken(folder: Path) -> tuple[int, int] | None:
    """The key under which the folder is held now; None where it cannot be locked."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None  # whoever writes there will say what is wrong
    stat = os.fstat(descriptor)
    key = stat.st_dev, stat.st_ino
    if key in _held:
        os.close(descriptor)
        _held[key][1] += 1
        return key
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise StoreError(
                f"another process writes into {folder}: end it first, or choose another out="
            ) from error
        return None  # several network file systems have no locks
    _held[key] = [descriptor, 1]
    return key


def _give_back(key: tuple[int, int] | None) -> None:
    if key is None or key not in _held:
        return
    _held[key][1] -= 1
    if not _held[key][1]:
        os.close(_held.pop(key)[0])


def _forget() -> None:
    """In a forked child: the lock is the parent's, and ends with it although the child lives on."""
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
