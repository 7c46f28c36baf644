"""Try every family of the installed transformers that can be made tiny, and write docs/coverage.md.

    python scripts/coverage.py [FAMILY ...]

Each family's model is built with random weights and small sizes (tests/conformance/attempts.py), put to the start-up
check, and its per-sample gradients are compared with autograd on single samples (tests/conformance/compare.py), in a
process of its own. Without names the families that have no result yet are tried, so that an interrupted command goes
on where it stopped; families that are named are tried again. The results are experiments/results/coverage.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from conformance.attempts import attempts  # noqa: E402
from conformance.compare import compare  # noqa: E402
from conformance.families import every_family  # noqa: E402
from coverage_page import PAGE, RESULTS, ROUNDING, page, read  # noqa: E402

from assay import CoverageError  # noqa: E402

LARGEST = 10_000_000  # entries of a small model
SECONDS, MEMORY = 40, 3 << 30  # of a processor, and room, for one family


def main() -> None:
    """Compare the families that have no result yet, or those named, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="try these again; without any, those without a result")
    families = parser.parse_args().families
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    known = read(RESULTS)[1] if RESULTS.exists() else {}
    for family in families or [family for family in every_family() if family not in known]:
        known[family] = _apart(family)
        print(family, known[family], flush=True)
        _write(RESULTS, known)
    _write(RESULTS, known)
    PAGE.write_text(page(RESULTS), encoding="utf-8")


def _write(path: Path, known: Mapping[str, dict[str, Any]]) -> None:
    """What it was measured with, then a line for each family; the whole file or the one before."""
    made = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "model_types": len(every_family()),
    }
    lines = [made, *({"family": family, **row} for family, row in sorted(known.items()))]
    draft = path.with_suffix(".draft")
    draft.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    draft.replace(path)


def _apart(family: str) -> dict[str, Any]:
    """What came of a family, found by a process of its own: what it breaks or holds on to goes with it."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_report, args=(family, theirs))
    process.start()
    theirs.close()
    try:
        row: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        why = f"more than {SECONDS} seconds" if late else f"the process ended with code {process.exitcode}"
        row = {"kind": "not tiny" if late else "failed", "why": why}
    process.join()
    return row


def _report(family: str, to: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # a family that wants more is not tiny
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))  # what does not listen to the signal
    to.send(_tried(family))
    to.close()
    os._exit(0)


def _tried(family: str) -> dict[str, Any]:
    """What came of a family: `kind` and what there is to say about it."""
    signal.signal(signal.SIGPROF, _give_up)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        try:
            model, inputs = next(attempts(family, LARGEST))
        except TimeoutError:
            raise
        except Exception as error:
            why = _first_line(error)
            return {"kind": "not tiny" if why.endswith("million parameters") else "not built", "why": why}
        return {**_compared(model, inputs), "inputs": [k for k in inputs if k != "use_cache"]}
    except TimeoutError:
        return {"kind": "not tiny", "why": f"more than {SECONDS} seconds"}
    except MemoryError:
        return {"kind": "not tiny", "why": f"more than {MEMORY >> 30} GiB of memory"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _compared(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    try:
        outcome = compare(model, inputs)
    except CoverageError as error:
        names, _, why = str(error).partition(": ")
        return {"kind": "refused", "why": _first_line(CoverageError(f"{why} ({names})"))}
    except TimeoutError:
        raise
    except AssertionError as error:  # nothing that it returns can be told apart by sample
        return {"kind": "not built", "why": _first_line(error)}
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):
            raise MemoryError from error
        return {"kind": "failed", "why": f"{type(error).__name__}: {_first_line(error)}"}
    if outcome.total != outcome.total:
        return {"kind": "failed", "why": "the model's own gradients are not finite"}
    worst = max(outcome.samples, outcome.total, outcome.deferred)
    ways = Counter(status for status in outcome.status.values() if status != "unused")
    kind = "wrong" if not worst < ROUNDING[1] else "fallback" if set(ways) - {"exact"} else "fast path"
    return {"kind": kind, "error": float(f"{worst:.1e}"), "ways": dict(sorted(ways.items()))}


def _give_up(*_: object) -> None:
    raise TimeoutError


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240].replace(str(ROOT), "").replace("|", "/")


if __name__ == "__main__":
    main()
