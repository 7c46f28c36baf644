"""How an experiment is run as a command, and how its result is kept."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent / "cache"


def run_as_command(
    name: str, module: str, experiment: Callable[..., dict[str, Any]], cached: bool = False
) -> None:
    """Run an experiment and keep its result as JSON; `--out` chooses another folder.

    Args:
        name: of the JSON file.
        module: that is run, such as "paths.adam".
        experiment: gives the result.
        cached: the experiment takes the folder in which its retrainings are kept, `--cache`.
    """
    parser = argparse.ArgumentParser(description=experiment.__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    if cached:
        parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the retrainings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = experiment(options.cache) if cached else experiment()
    result["seconds"] = round(time.perf_counter() - started)
    keep(options.out / f"{name}.json", result | _provenance(module))


def run_parts_as_command(
    name: str, module: str, parts: Mapping[str, Callable[[], list[Any]]], about: Mapping[str, Any]
) -> None:
    """Run the parts of an experiment and keep their results as one JSON; `--out` chooses another folder.

    Parts that are there already are left alone, so that an experiment that was stopped goes on; `--fresh` begins anew.

    Args:
        name: of the JSON file.
        module: that is run, such as "embeddings.mnist".
        parts: name → what computes it.
        about: settings, kept with the results.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.out / f"{name}.json"
    result: dict[str, Any] = {**about, "parts": {}, "seconds": 0.0}
    if file.exists() and not options.fresh:
        result = json.loads(file.read_text(encoding="utf-8")) | about
    for part, compute in parts.items():
        if part in result["parts"]:
            continue
        started = time.process_time()
        result["parts"][part] = compute()
        result["seconds"] = round(result["seconds"] + time.process_time() - started)
        keep(file, result | _provenance(module))


def keep(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result, its numbers to six digits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """The same with every number to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _provenance(module: str) -> dict[str, str]:
    return {"command": f"python -m experiments.{module}", "torch": torch.__version__.split("+")[0]}
