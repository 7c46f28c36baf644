"""Freed memory that is kept comes back without page faults."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import ctypes, json, resource, sys
from assay.allocator import keep_freed_memory
import torch

class Mallinfo(ctypes.Structure):  # of <malloc.h>, as are its fields
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
faults, held = [], []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(5 << 20, dtype=torch.uint8) for _ in range(40)]
    del several
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    held.append(mallinfo().fordblks)
print(json.dumps({"kept": kept, "faults": faults, "held": held}))
"""
MEMORY = 200 << 20  # what the script writes and frees in each of its rounds


def wrote(how: str, **environment: str) -> dict[str, Any]:
    """What `keep_freed_memory` answered, the page faults of each round and what the heap holds free after it."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        capture_output=True, text=True, check=True, env={**plain, **environment},
    )  # fmt: skip
    return dict(json.loads(done.stdout))


needs_mallinfo = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="glibc since 2.33 counts its heap",
)


@needs_mallinfo
def test_freed_memory_is_kept() -> None:
    # the first round only: later ones are kept by default too where something lies above them, by chance
    assert wrote("default")["held"][0] < MEMORY / 10
    kept = wrote("kept")
    assert kept["kept"]
    assert min(kept["held"]) > MEMORY * 0.9


@needs_mallinfo
def test_kept_memory_is_not_faulted_in_again() -> None:
    faults = wrote("kept")["faults"]
    if not faults[0]:
        pytest.skip("this system does not count page faults")
    assert faults[0] > MEMORY / os.sysconf("SC_PAGE_SIZE") / 2
    assert faults[-1] < faults[0] / 10


@needs_mallinfo
def test_what_the_environment_sets_is_left_alone() -> None:
    assert not wrote("kept", MALLOC_TRIM_THRESHOLD_="131072")["kept"]
