"""All of the evidence, one experiment after the other: `python -m experiments.evidence [--quick]`.

Every further argument is handed to each experiment. What is done already is not done again; `--fresh` begins anew.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time

EXPERIMENTS = ("mislabels", "fidelity", "effects", "curation", "composition", "ladder", "cost")


def main(arguments: list[str]) -> int:
    """Run them; the number of those that failed."""
    failed, started = 0, time.perf_counter()
    for name in EXPERIMENTS:
        module = f"experiments.evidence.{name}"
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not there", flush=True)
            failed += 1
            continue
        before = time.perf_counter()
        status = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
        failed += status != 0
        print(f"{module}: {time.perf_counter() - before:.0f} s, exit status {status}", flush=True)
    print(f"all: {time.perf_counter() - started:.0f} s, {failed} failed", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
