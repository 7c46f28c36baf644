"""Which domain is worth what to which target, from the beginning of pretraining to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import assay
from assay.errors import StoreError
from experiments.command import run_seeds_as_command
from experiments.evidence.pile import PileSettings, draw, valued, values_by_step
from experiments.evidence.shape import estimate

SETTINGS = Path(__file__).with_name("curation.yaml")
MIXTURE = "all domains"
PANELS = (MIXTURE, "python_code", "bible", "medical_qa")  # targets of the figure


def ledger_of(settings: PileSettings, seed: int, folder: Path) -> assay.Ledger:
    """The run that curation valued, or the same made now."""
    try:
        ledger = assay.open(folder)
        if ledger.info.get("settings", {}) | {"seeds": settings.seeds} == settings.model_dump(mode="json"):
            return ledger
    except StoreError:
        pass
    return valued(settings, draw(settings, seed), seed, folder)[1]


def one(settings: PileSettings, seed: int, cache: Path) -> dict[str, Any]:
    """Value per document by target, domain and window of the steps, and how many documents are negative."""
    ledger = ledger_of(settings, seed, cache / "curation" / f"seed{seed}" / "run")
    targets = ledger.targets
    steps = values_by_step(ledger).with_columns(pl.mean_horizontal(targets).alias(MIXTURE))
    length = int(steps["step"].max()) + 1  # type: ignore[arg-type]
    domains = ledger.metadata().select("id", "domain")
    steps = steps.join(domains, on="id").with_columns(window=pl.col("step") * settings.windows // length)
    by_window = steps.group_by("domain", "window").agg(pl.col(*targets, MIXTURE).sum(), visits=pl.len())
    values = {
        target: {
            str(domain): rows.sort("window")[target].to_numpy()
            for (domain,), rows in by_window.sort("domain").group_by("domain", maintain_order=True)
        }
        for target in (*targets, MIXTURE)
    }
    total = steps.group_by("id", "domain").agg(pl.col(*targets, MIXTURE).sum())
    negative = {}
    for (domain,), rows in total.sort("domain").group_by("domain", maintain_order=True):
        found = {"mixture": rows[MIXTURE], "own": rows[str(domain)]}
        others = rows.select(pl.mean_horizontal([t for t in targets if t != domain])).to_series()
        negative[str(domain)] = {
            name: (v < 0).sum() / len(v) for name, v in (found | {"others": others}).items()
        }
    return {
        "shares": {target: by_share(values[target]) for target in PANELS},
        "thirds": {target: [third(own, last) for last in (False, True)] for target, own in values.items()},
        "negative": negative,
        "steps": length,
    }


def by_share(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """By domain, `[windows]`: of what all domains together did for a target in a window, the part of this one."""
    total = np.sum(list(values.values()), axis=0)
    return {domain: (value / total).tolist() for domain, value in values.items()}


def third(values: dict[str, np.ndarray], last: bool) -> dict[str, float]:
    """The part of each domain in the first or the last third of the windows together."""
    part = max(1, len(next(iter(values.values()))) // 3)
    summed = {d: float(np.sum(v[-part:] if last else v[:part])) for d, v in values.items()}
    total = sum(summed.values())
    return {domain: value / total for domain, value in summed.items()}


def summary(settings: PileSettings, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares by window, what rose and what fell, and the negative share of every domain, over the seeds."""
    domains = list(seeds[0]["negative"])
    composition = [
        {
            "target": target,
            "domain": domain,
            "share": np.mean([seed["shares"][target][domain] for seed in seeds], axis=0).tolist(),
        }
        for target in PANELS
        for domain in domains
    ]
    moves = []
    for target in seeds[0]["thirds"]:
        for domain in domains:
            early, late = ([seed["thirds"][target][n][domain] for seed in seeds] for n in (0, 1))
            change = estimate(b - a for a, b in zip(early, late, strict=True))
            moves.append(
                {
                    "target": target,
                    "domain": domain,
                    "early": float(np.mean(early)),
                    "late": float(np.mean(late)),
                    "change": change,
                }
            )
    negative = [
        {
            "domain": domain,
            **{
                name: estimate([seed["negative"][domain][name] for seed in seeds])
                for name in ("mixture", "own", "others")
            },
        }
        for domain in domains
    ]
    return {"table": negative, "moves": moves, "composition": composition, "steps": seeds[0]["steps"]}


if __name__ == "__main__":
    run_seeds_as_command("composition", "evidence.composition", (PileSettings, SETTINGS), one, summary)
