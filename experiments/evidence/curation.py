"""Pretraining without the documents of negative value, beside the controls: is it the values, or only the dropping?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.stats import spearmanr
from torch import Tensor

from experiments.command import Pieces, run_seeds_as_command
from experiments.evidence.pile import (
    Corpus,
    PileSettings,
    Training,
    draw,
    learn,
    losses,
    steps_of,
    valued,
    values_by_step,
)
from experiments.evidence.shape import estimate

SETTINGS = Path(__file__).with_suffix(".yaml")
ARMS = {
    "all": "all documents",
    "other order": "all documents, in another order",
    "negative": "without the negative values",
    "random": "without as many at random",
    "same mixture": "without as many at random, as many of each domain",
    "top loss": "without as many of the highest loss",
    "no warm-up": "without the lowest values, those of the warm-up not counted",
    "highest": "without the highest values (the opposite)",
}


def choices(values: dict[str, Tensor], domains: list[str], loss: Tensor, seed: int) -> dict[str, Tensor]:
    """Which documents each arm leaves out, all of them as many.

    Args:
        values: `[documents]`, "all" and "no warm-up".
        domains: of the documents.
        loss: `[documents]`, under the model that was trained on all of them.
        seed: of the random choices.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    negative = (values["all"] < 0).nonzero().flatten()
    number = len(negative)
    kinds = sorted(set(domains))
    domain = torch.tensor([kinds.index(name) for name in domains])
    shuffled = torch.randperm(len(domain), generator=generator)
    same = [
        shuffled[domain[shuffled] == kind][: int((domain[negative] == kind).sum())]
        for kind in range(len(kinds))
    ]
    return {
        "negative": negative,
        "random": shuffled[:number],
        "same mixture": torch.cat(same),
        "top loss": loss.argsort(descending=True)[:number],
        "no warm-up": values["no warm-up"].argsort()[:number],
        "highest": values["all"].argsort(descending=True)[:number],
    }


def summed(steps: pl.DataFrame, targets: list[str], first: int, length: int) -> dict[str, Tensor]:
    """`[documents]` values for the mean of all targets, added up in several ways.

    "all" steps; those after the warm-up ("no warm-up"); every step weighing the same ("even steps", each value over
    the mean size of its step's); and each pass apart.
    """
    total = pl.mean_horizontal(targets)
    frame = steps.select("step", "id", value=total).with_columns(
        even=pl.col("value") / pl.col("value").abs().mean().over("step"),
        visit=pl.col("step").rank("ordinal").over("id"),
    )
    ways = {
        "all": pl.col("value"),
        "no warm-up": pl.col("value") * (pl.col("step") >= first),
        "even steps": pl.col("even"),
        "first pass": pl.col("value") * (pl.col("visit") == 1),
        "second pass": pl.col("value") * (pl.col("visit") == 2),
    }
    found = frame.group_by("id").agg(*(way.sum().alias(name) for name, way in ways.items())).sort("id")
    if found.height != length:
        raise ValueError(f"{length - found.height} documents were never seen")
    return {name: torch.tensor(found[name].to_list()).double() for name in ways}


def agreement(values: dict[str, Tensor]) -> dict[str, Any]:
    """How much the way of adding up matters, and how well the two passes agree."""
    number = int((values["all"] < 0).sum())
    size = values["all"].abs().sort(descending=True).values
    dropped = set((values["all"] < 0).nonzero().flatten().tolist())
    rows = {}
    for name, other in values.items():
        lowest = set(other.argsort()[:number].tolist())
        rows[name] = {
            "spearman": float(spearmanr(values["all"], other).statistic),
            "negative": float((other < 0).double().mean()),
            "same_dropped": len(dropped & lowest) / max(1, number),
        }
    return {
        "ways": rows,
        "passes": float(spearmanr(values["first pass"], values["second pass"]).statistic),
        "top_hundredth": float(size[: max(1, len(size) // 100)].sum() / size.sum()),
    }


def one(settings: PileSettings, seed: int, cache: Path) -> dict[str, Any]:
    """Value the documents, choose, and train every arm."""
    corpus = draw(settings, seed)
    pieces = Pieces(cache / "curation" / f"seed{seed}", settings)
    whole = pieces.once("all", lambda: value_all(settings, corpus, seed, pieces.folder / "run"))
    everything = torch.arange(len(corpus))
    arms = {"all": whole["training"]}
    arms["other order"] = pieces.once(
        "other order", partial(trained, settings, corpus, everything, seed, order_seed=2000 + seed)
    )
    for name, ids in whole["left_out"].items():
        kept = torch.ones(len(corpus), dtype=torch.bool)
        kept[ids] = False
        arms[name] = pieces.once(name, partial(trained, settings, corpus, kept.nonzero().flatten(), seed))
    about = {name: whole[name] for name in ("explained", "ways", "passes", "top_hundredth")}
    number = len(whole["left_out"]["negative"])
    return {
        "documents": len(corpus),
        "negative": number / len(corpus),
        **about,
        "arms": arms,
        "found_seconds": pieces.seconds,
    }


def value_all(settings: PileSettings, corpus: Corpus, seed: int, folder: Path) -> dict[str, Any]:
    """Train on all documents and value them; whom the arms leave out follows."""
    training, ledger = valued(settings, corpus, seed, folder)
    warmup = round(settings.warmup * steps_of(settings, corpus))
    values = summed(values_by_step(ledger), ledger.targets, warmup, len(corpus))
    left_out = choices(values, corpus.domains, losses(training.model, corpus.train), seed)
    shares = {name: ledger.explained(name) for name in ledger.targets}
    return {
        "training": told(training),
        "explained": sum(shares.values()) / len(shares),
        **agreement(values),
        "left_out": {name: ids.tolist() for name, ids in left_out.items()},
    }


def trained(
    settings: PileSettings, corpus: Corpus, kept: Tensor, seed: int, order_seed: int | None = None
) -> dict[str, Any]:
    """An arm."""
    return told(learn(settings, corpus, kept, seed, order_seed=order_seed))


def told(training: Training) -> dict[str, Any]:
    """What of a training is kept."""
    steps, tokens, loss = zip(*training.curve, strict=True)
    return {"steps": steps, "tokens": tokens, "loss": loss}


def reach(at: list[int], loss: list[float], level: float) -> float | None:
    """Where a loss first comes down to a level, between two evaluations by a straight line; None if it does not."""
    for n, value in enumerate(loss):
        if value <= level:
            if n == 0:
                return float(at[0])
            share = (loss[n - 1] - level) / (loss[n - 1] - value)
            return float(at[n - 1] + share * (at[n] - at[n - 1]))
    return None


def summary(settings: PileSettings, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Test loss after the same steps, at the same tokens, and steps and tokens to the loss of all documents."""
    table = []
    for arm, words in ARMS.items():
        rows: dict[str, list[Any]] = {}
        for seed in seeds:
            runs, own = seed["arms"], seed["arms"][arm]
            least = min(run["tokens"][-1] for run in runs.values())
            same = {name: float(np.interp(least, run["tokens"], run["loss"])) for name, run in runs.items()}
            level = runs["all"]["loss"][-1]
            steps, tokens = (reach(own[unit], own["loss"], level) for unit in ("steps", "tokens"))
            found = {
                "loss": own["loss"][-1],
                "against_all": own["loss"][-1] - level,
                "against_random": own["loss"][-1] - runs["random"]["loss"][-1],
                "against_mixture": own["loss"][-1] - runs["same mixture"]["loss"][-1],
                "tokens_against_all": same[arm] - same["all"],
                "tokens_against_random": same[arm] - same["random"],
                "steps_to": None if steps is None else steps / own["steps"][-1],
                "tokens_to": None if tokens is None else tokens / runs["all"]["tokens"][-1],
            }
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
        reached = {n: [v for v in rows.pop(n) if v is not None] for n in ("steps_to", "tokens_to")}
        table.append(
            {
                "arm": arm, "words": words, "reached": len(reached["steps_to"]),
                **{name: estimate(found) for name, found in rows.items()},
                **{name: estimate(found) if found else None for name, found in reached.items()},
            }
        )  # fmt: skip
    ways = {
        name: {
            key: float(np.mean([seed["ways"][name][key] for seed in seeds])) for key in seeds[0]["ways"][name]
        }
        for name in seeds[0]["ways"]
    }
    means = {
        name: estimate([seed[name] for seed in seeds])
        for name in ("negative", "explained", "passes", "top_hundredth")
    }
    return {"table": table, "ways": ways, **means}


if __name__ == "__main__":
    run_seeds_as_command("curation", "evidence.curation", (PileSettings, SETTINGS), one, summary)
