"""Try every family of the installed transformers that can be made tiny, and write what came of it to docs/coverage.md.

    python scripts/coverage.py [--results build/coverage.jsonl] [FAMILY ...]

Each family's model is built with random weights and small sizes (tests/conformance/attempts.py), put to the start-up
check, and its per-sample gradients are compared with autograd on single samples (tests/conformance/compare.py). The
results are kept family by family, so that an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import warnings
from collections import Counter
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

from assay import CoverageError  # noqa: E402

LARGEST, SECONDS, MEMORY = (
    10_000_000,
    40,
    12 << 30,
)  # entries of a small model; patience and room for one family
ROUNDING = 1e-9, 1e-5  # float64 throughout; float32 somewhere inside the model


def main() -> None:
    """Compare the families that have no result yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument(
        "--page-only", action="store_true", help="try nothing, write the page of what is known"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "coverage.jsonl")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # a family that wants more is not tiny
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = _read(options.results)
    with options.results.open("a") as file:
        for family in [] if options.page_only else options.families or every_family():
            if family not in known:
                print(family, flush=True)
                known[family] = _tried(family)
                file.write(json.dumps({"family": family, **known[family]}) + "\n")
                file.flush()
    (ROOT / "docs" / "coverage.md").write_text(_page(known))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {row.pop("family"): row for row in map(json.loads, lines)}


def _tried(family: str) -> dict[str, Any]:
    """What came of a family: `kind` and what there is to say about it."""
    signal.signal(signal.SIGPROF, _give_up)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process's own time
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
    except Exception as error:
        return {"kind": "failed", "why": f"{type(error).__name__}: {_first_line(error)}"}
    if outcome.total != outcome.total:
        return {"kind": "failed", "why": "the model's own gradients are not finite"}
    worst = max(outcome.samples, outcome.total, outcome.deferred)
    ways = Counter(status for status in outcome.status.values() if status != "unused")
    kind = "wrong" if not worst < ROUNDING[1] else "fallback" if set(ways) - {"exact"} else "fast path"
    return {"kind": kind, "error": worst, "ways": dict(ways)}


def _give_up(*_: object) -> None:
    raise TimeoutError


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240].replace(str(ROOT), "").replace("|", "/")


def _page(results: dict[str, dict[str, Any]]) -> str:
    kinds = Counter(row["kind"] for row in results.values())
    tried = sum(kinds[kind] for kind in ("fast path", "fallback", "refused", "failed", "wrong"))
    lines = [
        "# Coverage of transformers",
        "",
        f"Written by `python scripts/coverage.py` with transformers {transformers.__version__} and torch "
        f"{torch.__version__.split('+')[0]}. Every model type that can be made small was built with random weights: by "
        "the usual names of sizes, else by dividing every width of its default configuration by the same number. Its "
        "inputs are random; where a model takes images or sound in a form of its own, it was compared on text alone, "
        "as the table says. The per-sample gradients of every parameter were compared with autograd on single samples "
        "in float64.",
        "",
        f"Of {len(results)} model types {tried} were compared: **{kinds['fast path']} exact by the fast path, "
        f"{kinds['fallback']} exact with a named fallback for some parameters, {kinds['refused']} refused, "
        f"{kinds['failed']} failed, {kinds['wrong']} wrong.** The others were not compared: {kinds['not tiny']} are "
        f"too large for this command, {kinds['not built']} need a configuration, inputs or a library that it "
        "does not have"
        + (f", and {left} were not tried yet." if (left := len(set(every_family()) - set(results))) else "."),
        "",
        f"An error below {ROUNDING[0]:g} is float64 rounding; one up to {ROUNDING[1]:g} comes from models that cast to "
        "float32 inside (norms, routers, scans).",
        "",
    ]
    for kind, title in _TITLES.items():
        rows = {family: row for family, row in sorted(results.items()) if row["kind"] == kind}
        if rows:
            lines += [f"## {title}", "", *_table(kind, rows), ""]
    return "\n".join(lines)


_TITLES = {
    "wrong": "Wrong",
    "failed": "Failed",
    "refused": "Refused, and why",
    "fallback": "Exact with a named fallback",
    "fast path": "Exact by the fast path",
    "not tiny": "Not compared: not tiny",
    "not built": "Not compared: not built",
}


def _table(kind: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    if kind in ("fast path", "fallback", "wrong"):
        head = ["| family | inputs | largest relative error | parameters |", "|---|---|---|---|"]
        return head + [
            f"| {f} | {', '.join(r['inputs'])} | {r['error']:.1e} | {_ways(r['ways'])} |"
            for f, r in rows.items()
        ]
    return ["| family | why |", "|---|---|", *(f"| {f} | {r['why']} |" for f, r in rows.items())]


def _ways(ways: dict[str, int]) -> str:
    return ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))


if __name__ == "__main__":
    main()
