"""All of the evidence, one experiment after the other: `python -m experiments.evidence [--quick]`.

Every further argument is handed to each experiment. What is done already is not done again; `--fresh` begins anew. The
quick form always does, and keeps what it took, for the page.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

from experiments.command import RESULTS, keep
from experiments.evidence import EXPERIMENTS


def seconds_of_children() -> float:
    """Time of the processor that every process took that was started here and has ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: list[str]) -> int:
    """Run them; the number of those that failed."""
    quick = "--quick" in arguments
    failed, seconds = 0, {}
    for name in EXPERIMENTS:
        module, before = f"experiments.evidence.{name}", seconds_of_children()
        command = [sys.executable, "-m", module, *arguments, *(["--fresh"] if quick else [])]
        status = subprocess.run(command, check=False).returncode
        failed += status != 0
        seconds[name] = seconds_of_children() - before
        print(f"{module}: {seconds[name]:.0f} s, exit status {status}", flush=True)
    print(f"all: {sum(seconds.values()):.0f} s, {failed} failed", flush=True)
    if quick and not failed:
        about = {
            "command": "python -m experiments.evidence --quick",
            "torch": torch.__version__.split("+")[0],
        }
        keep(
            RESULTS / "quick.json", {"experiments": seconds, "seconds": round(sum(seconds.values()))} | about
        )
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
