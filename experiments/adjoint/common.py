"""What the experiments share: one run watched by every method, and how values are held against the truth."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import assay
from assay.evaluate import Removal, rank_correlation

RESULTS = Path(__file__).parents[1] / "results"
PATHS = ("left", "trapezoid")


def run_as_command(name: str, experiment: Callable[[], dict[str, Any]]) -> None:
    """Run an experiment and keep its result as JSON; `--out` chooses another folder."""
    parser = argparse.ArgumentParser(description=experiment.__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = experiment()
    result["seconds"] = round(time.perf_counter() - started)
    result["command"] = f"python -m experiments.adjoint.{name.removeprefix('adjoint_')}"
    result["torch"] = torch.__version__.split("+")[0]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(_rounded(result), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def dot_products(
    model: nn.Module,
    queries: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    samples: Sequence[Any],
) -> Tensor:
    """`[queries, samples]`: the plain dot product of gradients at the final weights."""

    def gradient(batch: Any) -> Tensor:
        found = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
        return torch.cat([g.flatten() for g in found])

    model.eval()
    return torch.stack([gradient(q) for q in queries]) @ torch.stack([gradient(s) for s in samples]).t()


def in_run_values(ledger: assay.Ledger) -> Tensor:
    """`[targets, rows]`, the rows as in `ledger.rows`."""
    found = [ledger.steps(target)["value"].to_list() for target in ledger.targets]
    return torch.tensor(found, dtype=torch.float64)


def places(ledger: assay.Ledger, removals: Sequence[Removal]) -> list[int]:
    """Where in `ledger.rows` the one term of each removal is."""
    first: dict[int, int] = {}
    for n, step in enumerate(ledger.rows["step"]):
        first.setdefault(step, n)
    return [first[step] + row for ((step, row),) in removals]


def spearman(found: Tensor, truth: Tensor) -> float:
    """Rank correlation, averaged over the queries."""
    return float(rank_correlation(found.double(), truth.double()).mean())


def by_id(ledger: assay.Ledger, values: Tensor, ids: int) -> Tensor:
    """`[queries, ids]`: the values of each sample summed over its steps; ids are 0 to `ids` − 1."""
    place = torch.tensor(ledger.rows["id"].to_list())
    return torch.zeros(len(values), ids, dtype=torch.float64).index_add(1, place, values.double())


Watched = tuple[assay.Ledger, nn.Module, Optimizer]
