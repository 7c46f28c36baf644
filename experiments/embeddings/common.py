"""What the experiments on data value embeddings share: how a run is recorded and compared, and how a result is kept."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parents[1] / "results"


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last dimension, ties in the order of their places."""
    return x.argsort(-1).argsort(-1).double()


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation over the last dimension, the mean over all others."""
    x, y = ranks(a.double()), ranks(b.double())
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())


def run_as_command(name: str, parts: Mapping[str, Callable[[], list[Any]]], about: Mapping[str, Any]) -> None:
    """Run the parts of an experiment and keep their results as JSON; `--out` chooses another folder.

    Parts that are there already are left alone, so that an experiment that was stopped goes on; `--fresh` begins anew.

    Args:
        name: of the experiment's module.
        parts: name → what computes it.
        about: settings, kept with the results.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"embeddings_{name}.json"
    document: dict[str, Any] = {**about, "parts": {}, "seconds": 0.0}
    if file.exists() and not options.fresh:
        document = json.loads(file.read_text(encoding="utf-8")) | about
    document["command"] = f"python -m experiments.embeddings.{name}"
    document["torch"] = torch.__version__.split("+")[0]
    for part, compute in parts.items():
        if part in document["parts"]:
            continue
        started = time.process_time()
        document["parts"][part] = _rounded(compute())
        document["seconds"] = round(document["seconds"] + time.process_time() - started)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
