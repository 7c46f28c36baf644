"""Ledgers to report on, recorded through the store itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from assay.store import Ledger, RunWriter

DOMAINS = ["law", "code", "prose", "math", "news", "letters", "recipes", "poems", "logs"]

ATTACKS = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload=alert(1)>',
    "' onmouseover='window.hacked = 1",
    "</pre></style><style>*{display:none}</style>",
    "<!-- <script>",
    "{{ 7 * 7 }} {% raw %} ]]> &lt;b&gt; \u2028 \x00 \u202e",
    "<a href='javascript:window.hacked=1'>x</a>",
]


def record(
    targets: tuple[str, ...] = ("code", "law"),
    samples: int = 120,
    steps: int = 60,
    batch: int = 8,
    metadata: pl.DataFrame | None = None,
    nan_step: int | None = 7,
    out: Any = None,
) -> Ledger:
    """A run with known structure: domain d helps target t by an amount of its own, and noise."""
    rng = np.random.default_rng(0)
    ids = [f"doc-{i:04d}" for i in range(samples)]
    domain = np.arange(samples) % len(DOMAINS)
    worth = rng.normal(0.0, 1.0, (len(DOMAINS), len(targets)))
    info = {
        "config": {"model": {"layers": 2}, "seed": 3},
        "versions": {"assay": "0"},
        "summary": {"overhead": 0.12},
    }
    writer = RunWriter(out, targets, info)
    writer.add_metadata(
        pl.DataFrame(
            {
                "id": ids,
                "domain": [DOMAINS[d] for d in domain],
                "year": [2000 + i % 4 for i in range(samples)],
                "text": [f"Text number {i}. " + "word " * (i % 50) for i in range(samples)],
            }
        ).filter(pl.col("id") != "doc-0005")  # one sample without metadata
        if metadata is None
        else metadata
    )
    for step in range(steps):
        rows = rng.choice(samples, batch, replace=False)
        values = 1e-3 * (worth[domain[rows]] + rng.normal(0.0, 1.0, (batch, len(targets))))
        status = "ok"
        if step == nan_step:
            values[0], status = np.nan, "nan"
        writer.add_values(step, 0, [ids[row] for row in rows], values)
        for name, predicted in zip(targets, values.sum(0), strict=True):
            carried, decayed, residual = rng.normal(2e-3, 1e-3), -1e-4, rng.normal(0.0, 1e-4)
            actual = predicted + carried + decayed + residual
            writer.add_account(step, name, predicted, carried, decayed, actual, residual, status)
    writer.add_table(
        "curve", pl.DataFrame({"step": np.arange(1.0, steps + 1), "loss": np.linspace(5.0, 3.0, steps)})
    )
    writer.add_table(
        "agreement",
        pl.DataFrame(
            {
                "method": [
                    m for m in ("in-run values", "embeddings", "influence functions") for _ in targets
                ],
                "query": list(targets) * 3,
                "by_step": [0.71] * 2 * len(targets) + [None] * len(targets),
                "by_id": [0.93] * len(targets) + [0.64] * len(targets) + [-0.2] * len(targets),
            }
        ),
    )
    writer.add_table(
        "coverage",
        pl.DataFrame(
            {
                "parameter": ["wte.weight", "wpe.weight"],
                "entries": [3000, 1000],
                "percent": [75.0, 25.0],
                "status": ["exact", "excluded"],
                "operations": ["embedding, linear", ""],
            }
        ),
    )
    writer.close()
    return writer.ledger


@pytest.fixture
def make_ledger() -> Callable[..., Ledger]:
    """`record`, for tests that want a ledger of their own."""
    return record


@pytest.fixture
def attacks() -> list[str]:
    """Texts that try to break out of the page; nine of them."""
    return list(ATTACKS)


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    """A small run with two targets, nine domains, one NaN and one sample without metadata."""
    return record()
