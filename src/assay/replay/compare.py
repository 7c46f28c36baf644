"""Which cheaper method to trust on a run: its rank correlation with the exact answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor

from assay.errors import InputError
from assay.evaluate.lds import rank_correlation

if TYPE_CHECKING:
    from assay.store import Ledger

__all__ = ["TABLE", "agreement"]

IN_RUN = "in-run values"
TABLE = "agreement"
"""The side table of a run in which `assay adjoint` keeps it: method, query, by_step, by_id."""


def agreement(
    ledger: Ledger, exact: Tensor, others: Mapping[str, Tensor], targets: Sequence[str] | None = None
) -> pl.DataFrame:
    """Rank correlations with the exact answer; see `Ledger.agreement`."""
    rows = ledger.rows
    named = list(targets) if targets is not None else list(ledger.targets)
    if targets is not None and len(named) != len(exact):
        raise InputError(f"agreement(targets=...): {len(named)} names for {len(exact)} rows of exact values.")
    if exact.dim() != 2 or exact.shape[1] != len(rows):
        raise InputError(
            f"agreement(exact): shape {list(exact.shape)}, but the run has {len(rows)} rows; give what adjoint gave."
        )
    compared = dict(others)
    if len(named) == len(exact) and set(named) <= set(ledger.targets):
        compared = {IN_RUN: _recorded(ledger, rows, named), **compared}
    ids, place = torch.unique(_numbers(rows), return_inverse=True)
    seen = ~exact.isnan().any(0)
    table: list[dict[str, Any]] = []
    for method, values in compared.items():
        by_step, by_id = _correlations(method, values, exact, place, len(ids), seen)
        for query in range(len(exact)):
            name = named[query] if len(named) == len(exact) else str(query)
            table.append(
                {
                    "method": method,
                    "query": name,
                    "by_step": None if by_step is None else float(by_step[query]),
                    "by_id": float(by_id[query]),
                }
            )
    schema = {"method": pl.String, "query": pl.String, "by_step": pl.Float64, "by_id": pl.Float64}
    return pl.DataFrame(table, schema=schema).sort(
        "by_id", descending=True, nulls_last=True, maintain_order=True
    )


def _correlations(
    method: str, values: Tensor, exact: Tensor, place: Tensor, ids: int, seen: Tensor
) -> tuple[Tensor | None, Tensor]:
    """`[queries]` each: over the rows, and over the samples."""

    def summed(rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), ids, dtype=torch.float64).index_add(
            1, place[seen], rows[:, seen].double()
        )

    if values.shape == exact.shape:
        values = values.detach().cpu()
        return rank_correlation(values[:, seen], exact[:, seen]), rank_correlation(
            summed(values), summed(exact)
        )
    if values.shape == (len(exact), ids):
        return None, rank_correlation(values.detach().cpu().double(), summed(exact))
    raise InputError(
        f"agreement(others={{{method!r}: ...}}): shape {list(values.shape)}; give [queries, rows] {list(exact.shape)}, "
        f"or [queries, ids] {[len(exact), ids]}."
    )


def _numbers(rows: pl.DataFrame) -> Tensor:
    """`[rows]`: the number of each row's id, in the order of first appearance."""
    order = {id_: n for n, id_ in enumerate(rows["id"].unique(maintain_order=True))}
    return torch.tensor([order[id_] for id_ in rows["id"]])


def _recorded(ledger: Ledger, rows: pl.DataFrame, targets: Sequence[str]) -> Tensor:
    """`[targets, rows]`, or `[targets, ids]` where momentum carried values to later steps: the in-run values."""
    steps = [ledger.steps(target) for target in targets]
    if all(len(found) == len(rows) for found in steps):
        return torch.stack([_column(found) for found in steps])
    ids = rows.select("id").unique(maintain_order=True)
    summed = [ids.join(ledger.values(name), on="id", how="left", maintain_order="left") for name in targets]
    return torch.stack([_column(found).nan_to_num() for found in summed])


def _column(frame: pl.DataFrame) -> Tensor:
    return torch.from_numpy(frame["value"].cast(pl.Float64).to_numpy(writable=True))
