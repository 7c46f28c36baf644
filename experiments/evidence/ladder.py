"""The paraphrase ladder: at which rank a verse comes when the model is asked with it, or a paraphrase of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from assay.demo.gpt import GPT, GPTConfig
from assay.evaluate.baselines import (
    BM25,
    Cosine,
    DotProduct,
    Embeddings,
    Influence,
    Scorer,
    TextSimilarity,
    TracIn,
    score,
)
from assay.evaluate.intervals import mean_with_interval
from assay.evaluate.subsets import SubsetTraining
from assay.evaluate.task import SubsetLoop, Task
from assay.methods import InRunShapley
from assay.train.batches import make_batch, make_rows
from assay.train.tokenizer import learn_tokenizer
from experiments.command import Pieces, run_seeds_as_command
from experiments.evidence.pile import pile, row_losses
from experiments.settings import TextSettings

SETTINGS = Path(__file__).with_suffix(".yaml")
VERSES = Path(__file__).parents[3] / "shared" / "data" / "paraphrase.parquet"
RUNGS = ("verbatim", "light", "heavy", "same topic")
RECALLED = (1, 10)


class LadderSettings(TextSettings):
    """Documents, the model, its training, and the methods' own."""

    originals: int
    verses: int
    others: int
    light: float
    heavy: float
    rank: int
    damping: float


@dataclass(frozen=True)
class Ladder:
    """Documents to train on, and what is asked.

    Args:
        documents: texts; the originals are the first of them.
        queries: texts.
        rungs: of each query.
        originals: of each query, the place of its original among the documents.
    """

    documents: list[str]
    queries: list[str]
    rungs: list[str]
    originals: list[int]


def words_of(text: str) -> set[str]:
    """The words of a text."""
    return set(re.findall(r"[a-z]+", text.lower()))


def shared_words(a: str, b: str) -> float:
    """Of the words of both texts together, the share that is in both."""
    return len(words_of(a) & words_of(b)) / max(1, len(words_of(a) | words_of(b)))


def climb(settings: LadderSettings, seed: int) -> Ladder:
    """Draw the documents and the queries of a seed.

    The neighbour of an original, the verse after it in its chapter, is asked in the other translation and not trained
    on in either.
    """
    frame = pl.read_parquet(VERSES).unique("kjv", maintain_order=True)
    place = {verse: n for n, verse in enumerate(frame["verse"])}

    def after(verse: str) -> int | None:
        chapter, number = verse.rsplit(":", 1)
        return place.get(f"{chapter}:{int(number) + 1}")

    likeness = [shared_words(a, b) for a, b in frame.select("kjv", "web").iter_rows()]
    shuffled = np.random.default_rng(seed).permutation(frame.height).tolist()
    taken: list[int] = []
    neighbours: set[int] = set()
    for among in (
        [n for n in shuffled if settings.light <= likeness[n] < 1],
        [n for n in shuffled if likeness[n] <= settings.heavy],
    ):
        fits = 0
        for n in among:
            following = after(frame["verse"][n])
            if fits == settings.originals:
                break
            if following is None or following in taken or n in neighbours:
                continue
            taken.append(n)
            neighbours.add(following)
            fits += 1
    rest = [n for n in shuffled if n not in neighbours and n not in taken]
    verses = [*taken, *rest[: settings.verses - len(taken)]]
    others = pile().filter(pl.col("domain") != "bible").sample(settings.others, seed=seed, shuffle=True)
    kjv, web = frame["kjv"].to_list(), frame["web"].to_list()
    queries, rungs, originals = [], [], []
    for rung in RUNGS:
        for place_, n in enumerate(taken):
            own = RUNGS[1] if place_ < settings.originals else RUNGS[2]
            if rung in RUNGS[1:3] and rung != own:
                continue
            following = after(frame["verse"][n])
            assert following is not None
            queries.append({"verbatim": kjv[n], "same topic": web[following]}.get(rung, web[n]))
            rungs.append(rung)
            originals.append(place_)
    return Ladder([*(kjv[n] for n in verses), *others["text"]], queries, rungs, originals)


def task_of(settings: LadderSettings, ladder: Ladder, seed: int) -> Task:
    """The same as a task: a small GPT trained from nothing on the documents."""
    tokenizer = learn_tokenizer(ladder.documents, settings.vocabulary)

    def pair(texts: list[str]) -> tuple[Tensor, Tensor]:
        batch = make_batch(make_rows(range(len(texts)), tokenizer.encode(texts), settings.context, "cut"))
        return batch.tokens, batch.targets

    config = GPTConfig(tokenizer.size, settings.context, settings.layers, settings.heads, settings.width)
    data, queries = pair(ladder.documents), pair(ladder.queries)

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)

    training = SubsetTraining(adamw, epochs=settings.passes, batch=settings.batch)
    loop = SubsetLoop(lambda: GPT(config), row_losses, data, training, seed)
    return Task(row_losses, data, queries, loop, texts=(ladder.documents, ladder.queries))


PATHS = {"left": "first order", "trapezoid": "second order, trapezoid", "hessian": "second order, Hessian"}


def in_run(task: Task, path: str, words: str) -> dict[str, Tensor]:
    """`[Q, N]` values summed over the steps: as they are, and each over the mean size of its step's.

    Steps differ: Adam's first ones and those of a high learning rate move the loss most, whatever they are fed.
    """
    targets = task.targets()
    ledger = task.loop.train([InRunShapley(targets, path, band=(0.0, 1e9))]).recorded
    found = {even: torch.zeros(task.asked, task.examples, dtype=torch.float64) for even in (False, True)}
    for n, target in enumerate(targets):
        for even, scores in found.items():
            values = ledger.values(target, even=even)
            scores[n, values["id"].to_list()] = torch.tensor(values["value"].to_list()).double()
    return {f"in-run, {words}": found[False], f"in-run, {words}, every step alike": found[True]}


def methods(settings: LadderSettings) -> dict[str, Scorer]:
    """What is compared, by its name in the table."""
    return {
        "data value embeddings": Embeddings(rank=settings.rank),
        "influence (LoGra)": Influence("logra", settings.rank, settings.damping),
        "influence (LoGra, RelatIF)": Influence("logra", settings.rank, settings.damping, "relatif"),
        "TracIn": TracIn(),
        "gradient dot product": DotProduct(),
        "gradient cosine": Cosine(),
        "sentence similarity": TextSimilarity(),
        "BM25": BM25(),
    }


def ranks(scores: Tensor, originals: list[int]) -> list[float]:
    """The rank of each query's original, from 1; among equal scores the middle."""
    own = scores[torch.arange(len(originals)), torch.tensor(originals)][:, None]
    found = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return [float(rank) for rank in found]


def asked(task: Task, name: str, method: Scorer) -> dict[str, Tensor]:
    """`[Q, N]` scores of one method, by its name."""
    return {name: score(method, task).values}


def one(settings: LadderSettings, seed: int, cache: Path) -> dict[str, Any]:
    """Train, ask every method, and look where the originals come."""
    ladder = climb(settings, seed)
    task = task_of(settings, ladder, seed)
    pieces = Pieces(cache / "ladder" / f"seed{seed}", settings)
    found: dict[str, list[float]] = {}

    def placed(name: str, compute: Callable[[], dict[str, Tensor]]) -> None:
        def all_ranks() -> dict[str, list[float]]:
            return {name: ranks(scores, ladder.originals) for name, scores in compute().items()}

        found.update(pieces.once(name, all_ranks))

    for path, words in PATHS.items():
        placed(path, partial(in_run, task, path, words))
    for name, method in methods(settings).items():
        placed(name, partial(asked, task, name, method))
    chance = torch.Generator().manual_seed(seed)
    placed("random", lambda: {"random": torch.rand(task.asked, task.examples, generator=chance)})
    return {
        "rungs": ladder.rungs,
        "documents": len(ladder.documents),
        "ranks": found,
        "found_seconds": pieces.seconds,
    }


def bootstrapped(found: Tensor) -> dict[str, float | None]:
    """Mean and interval over the queries."""
    mean = mean_with_interval(found)
    ends = (mean.low, mean.high) if len(found) > 1 else (None, None)
    return {"mean": mean.mean, "low": ends[0], "high": ends[1]}


def summary(settings: LadderSettings, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean rank and recall by method and rung, with bootstrap intervals over the queries of all seeds."""
    table = []
    for name in seeds[0]["ranks"]:
        for rung in RUNGS:
            pooled = torch.tensor(
                [
                    rank
                    for seed in seeds
                    for rank, own in zip(seed["ranks"][name], seed["rungs"], strict=True)
                    if own == rung
                ]
            )
            row = {"method": name, "rung": rung, "queries": len(pooled), "rank": bootstrapped(pooled)}
            row["median"] = float(pooled.quantile(0.5))
            row |= {f"recall{k}": bootstrapped((pooled <= k).double()) for k in RECALLED}
            table.append(row)
    return {"table": table, "documents": seeds[0]["documents"]}


if __name__ == "__main__":
    run_seeds_as_command("ladder", "evidence.ladder", (LadderSettings, SETTINGS), one, summary)
