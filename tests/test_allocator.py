"""Freed memory that is kept comes back without page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from assay.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
import torch
for _ in range(5):
    before = faults()
    several = [torch.ones(5 << 20, dtype=torch.uint8) for _ in range(40)]
    del several
print(kept, faults() - before)
"""


def faults(how: str, **environment: str) -> tuple[bool, int]:
    """What `keep_freed_memory` answered, and page faults of writing 200 MiB for the fifth time."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        capture_output=True, text=True, check=True, env={**plain, **environment},
    )  # fmt: skip
    kept, number = done.stdout.split()
    return kept == "True", int(number)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is on Linux")
def test_kept_memory_is_not_faulted_in_again() -> None:
    pages = (200 << 20) // os.sysconf("SC_PAGE_SIZE")
    _, given_back = faults("default")
    kept, again = faults("kept")
    if not kept:
        pytest.skip("another C library")
    assert given_back > pages / 2
    assert again < pages / 100


def test_what_the_environment_sets_is_left_alone() -> None:
    assert not faults("kept", MALLOC_TRIM_THRESHOLD_="131072")[0]
