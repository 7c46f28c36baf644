"""Record small runs in child processes that kill themselves: `python killed.py FOLDER`, for test_kills.py.

Each child dies by SIGKILL at the n-th time that it comes to one point of writing a file, for every point and
every n until a child survives. What reached the disk for certain it notes in `FOLDER/POINT-N/acknowledged`.
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from assay.store import RunWriter, files

STEPS = 2
POINTS = ("torn write", "before sync", "before rename", "after rename")


def expected(step: int) -> np.ndarray:
    """Values of one step, shape [2 samples, 1 target]."""
    return np.array([[step + 0.5], [-step - 0.25]])


def record(folder: Path) -> None:
    """One run with a flush per step; a byte is noted for every flush that came back."""
    acknowledged = os.open(folder / "acknowledged", os.O_WRONLY | os.O_CREAT)
    writer = RunWriter(folder / "run", ["t"])
    for step in range(STEPS):
        writer.add_values(step, 0, ["a", f"only {step}"], expected(step))
        writer.add_account(step, "t", step, 0, 0, step, 0)
        writer.add_metadata(pl.DataFrame({"id": [f"only {step}"], "domain": [str(step)]}))
        writer.add_table("curve", pl.DataFrame({"step": list(range(step + 1))}))
        writer.flush()
        os.write(acknowledged, b".")
    writer.close()
    os.write(acknowledged, b"!")


def die_at(point: str, n: int) -> None:
    """Arrange for this process to kill itself at the n-th passage of a point."""
    passed = 0

    def is_time() -> bool:
        nonlocal passed
        passed += 1
        return passed == n

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            now = is_time()
            if now and before:
                die()
            result = call(*args)
            if now:
                die()
            return result

        return wrapped

    class Torn:
        def __init__(self, *args: Any) -> None:
            self.file = builtins.open(*args)  # noqa: SIM115  (closed by __exit__)

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> None:
            if is_time():
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()
            self.file.write(data)

    if point == "torn write":
        files.open = Torn  # type: ignore[attr-defined]
    elif point == "before sync":
        os.fsync = around(os.fsync, before=True)
    else:
        os.replace = around(os.replace, before=point == "before rename")


def main(folder: Path) -> None:
    for point in POINTS:
        for n in range(1, 1000):
            out = folder / f"{point}-{n}"
            out.mkdir()
            child = os.fork()  # before polars is used here: a fork would not carry over its threads
            if child == 0:
                die_at(point, n)
                record(out)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                if status:
                    sys.exit(f"child {point}-{n} failed with status {status}")
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]))
