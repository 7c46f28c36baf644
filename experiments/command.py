"""How an experiment is run as a command, and its result kept."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def run_as_command(name: str, module: str, experiment: Callable[[], dict[str, Any]]) -> None:
    """Run an experiment and keep its result as JSON; `--out` chooses another folder.

    Args:
        name: of the JSON file.
        module: that is run, such as "paths.adam".
        experiment: gives the result.
    """
    parser = argparse.ArgumentParser(description=experiment.__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = experiment()
    result["seconds"] = round(time.perf_counter() - started)
    result |= provenance(module)
    keep(out / f"{name}.json", result)


def provenance(module: str) -> dict[str, str]:
    """The command and the torch of a result."""
    return {"command": f"python -m experiments.{module}", "torch": torch.__version__.split("+")[0]}


def keep(file: Path, result: dict[str, Any]) -> None:
    """Write a result, its numbers to six digits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """The same with every number to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
