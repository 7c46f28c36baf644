"""What the memory allocator adds to a step, with glibc's own thresholds and where freed memory is kept.

glibc gives freed memory at the end of its heap back to the system. What a step asks for next then comes in fresh pages,
each with a page fault, and how many depends on where in the heap the arrays happen to lie. Two environment variables
keep it: see `KEPT`.

Arms as in `overhead.py`, each in a process of its own with a heap of its own, as where one trains: one step of each per
round, in an order drawn for it (`rounds`), while the others sleep. Page faults and system time are those of the step.

    python benchmarks/allocator.py            # about 6 minutes on two cores; JSON and its part of docs/performance.md
    python benchmarks/allocator.py --quick    # seconds, nothing written but to --out
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))

import allocator_page
import overhead
from overhead import RESULTS, Size
from rounds import in_rounds, summary

KEPT = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc's largest threshold for memory outside the heap, and no giving back of the heap's end."""
ALLOCATORS: dict[str, Mapping[str, str]] = {"default": {}, "kept": KEPT}
SIZE, QUICK = Size(16, 256, 384, 2), Size(4, 16, 32, 1)


class Apart:
    """An arm in a process of its own; called, it takes a step there.

    Args:
        environment: of that process, beside this one's.
        size: of the model.
        optimizer: that trains it.
        kind: of step, as in `overhead.arm`.

    Attributes:
        used: page faults and seconds of system time of each step.
    """

    def __init__(self, environment: Mapping[str, str], size: Size, optimizer: str, kind: str) -> None:
        self.used: list[tuple[int, float]] = []
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        arguments = (other, torch.get_num_threads(), size, optimizer, kind)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        with patch.dict(os.environ, environment):
            self._process.start()

    def __call__(self) -> None:
        """Take a step."""
        self._pipe.send(True)
        self.used.append(self._pipe.recv())

    def end(self) -> None:
        """Let the process end."""
        self._pipe.send(False)
        self._process.join()


def serve(pipe: Connection, threads: int, size: Size, optimizer: str, kind: str) -> None:
    """A step whenever one is asked for; answers what it used."""
    torch.set_num_threads(threads)
    step = overhead.arm(Namespace(family="gpt2", device="cpu", accumulate=1), size, optimizer, kind)
    while pipe.recv():
        before = resource.getrusage(resource.RUSAGE_SELF)
        step()
        after = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime))


def measure(options: Namespace) -> list[dict[str, Any]]:
    """One row per optimizer, allocator and arm; ratios to the plain step of the same optimizer and allocator."""
    size = QUICK if options.quick else SIZE
    arms = {
        (optimizer, allocator, kind): Apart(environment, size, optimizer, kind)
        for optimizer in overhead.OPTIMIZERS
        for allocator, environment in ALLOCATORS.items()
        for kind in overhead.KINDS
    }
    times = in_rounds(arms, options.rounds, warmup=3)
    rows = []
    for (optimizer, allocator, kind), taken in times.items():
        arm = arms[optimizer, allocator, kind]
        arm.end()
        faults, system = zip(*arm.used[-len(taken) :], strict=True)
        plain, bare, usual = (
            times[optimizer, at, of]
            for at, of in ((allocator, "plain"), (allocator, "pass"), ("default", kind))
        )
        rows.append(
            {
                "size": size._asdict(),
                "optimizer": optimizer,
                "allocator": allocator,
                "arm": kind,
                "seconds": summary(taken),
                "ratio": summary([a / p for a, p in zip(taken, plain, strict=True)]),
                "above_pass": summary([(a - v) / p for a, v, p in zip(taken, bare, plain, strict=True)]),
                "of_default": summary([a / d for a, d in zip(taken, usual, strict=True)]),
                "faults": statistics.median(faults),
                "system_seconds": statistics.median(system),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON; `performance.py --page` then writes the page."""
    parser = argparse.ArgumentParser(prog="allocator", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny size; writes only to --out")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file (results/allocator-cpu.json)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.rounds = min(options.rounds, 3) if options.quick else options.rounds
    settings = {"rounds": options.rounds, "environment": KEPT}
    about = {"machine": overhead.machine(Namespace(device="cpu")), "settings": settings}
    document = {**about, "rows": measure(options)}
    print(allocator_page.part(document))
    out = options.out or (None if options.quick else RESULTS / "allocator-cpu.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
