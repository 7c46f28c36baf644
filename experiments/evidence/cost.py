"""Time and memory of every method on the same work, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl
import torch

from assay.demo.gpt import GPT, GPTConfig
from assay.errors import AssayError
from assay.evaluate.baselines import (
    BM25,
    Adjoint,
    Cosine,
    DotProduct,
    Embeddings,
    Influence,
    InRun,
    Scorer,
    TextSimilarity,
    TracIn,
    Trak,
    unavailable,
)
from assay.evaluate.subsets import SubsetTraining
from assay.evaluate.task import SubsetLoop, Task
from assay.train.batches import make_batch, make_rows
from assay.train.tokenizer import Tokenizer, learn_tokenizer
from experiments.command import Pieces, run_seeds_as_command
from experiments.evidence.pile import pile, row_losses
from experiments.settings import TextSettings

SETTINGS = Path(__file__).with_suffix(".yaml")
STATUS = Path("/proc/self/status")
MIB = 2**10  # of the kB that the kernel counts in


class CostSettings(TextSettings):
    """The work, and how often it is measured."""

    documents: int
    queries: int
    rank: int
    rounds: int
    more_documents: int  # so many times as many, for what one more costs; 1: not asked
    more_queries: int
    methods: list[str] | None = None  # all, if left out


@dataclass(frozen=True)
class Measured:
    """A method, how it is asked, and when it works.

    Args:
        make: makes it, from the rank of projections.
        watches: it watches a training, so that only what it adds to one is its own.
        together: one score for all queries together.
    """

    make: Callable[[int], Scorer]
    watches: bool = False
    together: bool = False


def in_run(path: str, together: bool = False) -> Measured:
    """In-run values by a path."""
    return Measured(partial(_in_run, path), watches=True, together=together)


def _in_run(path: str, rank: int) -> Scorer:
    return InRun(path)


METHODS: dict[str, Measured] = {
    "in-run, left, one target": in_run("left", together=True),
    "in-run, trapezoid, one target": in_run("trapezoid", together=True),
    "in-run, simpson, one target": in_run("simpson", together=True),
    "in-run, hessian, one target": in_run("hessian", together=True),
    "in-run, trapezoid": in_run("trapezoid"),
    "data value embeddings": Measured(lambda rank: Embeddings(rank=rank), watches=True),
    "exact adjoint": Measured(lambda rank: Adjoint(), watches=True),
    "influence (LoGra)": Measured(lambda rank: Influence("logra", rank)),
    "influence (LoGra, PCA)": Measured(lambda rank: Influence("logra-pca", rank)),
    "influence (EKFAC, no projection)": Measured(lambda rank: Influence("ekfac")),
    "TRAK": Measured(lambda rank: Trak()),
    "TracIn": Measured(lambda rank: TracIn()),
    "gradient dot product": Measured(lambda rank: DotProduct()),
    "gradient cosine": Measured(lambda rank: Cosine()),
    "sentence similarity": Measured(lambda rank: TextSimilarity()),
    "BM25": Measured(lambda rank: BM25()),
}


def tokenizer_of(settings: CostSettings) -> Tokenizer:
    """The same for any amount of work."""
    return learn_tokenizer(pile()["text"][:2000], settings.vocabulary)


def task_of(
    settings: CostSettings, tokenizer: Tokenizer, seed: int, together: bool, documents: int, queries: int
) -> Task:
    """Documents, queries, and a training that begins anew."""
    most = (settings.documents * settings.more_documents, settings.queries * settings.more_queries)
    long = pile().filter(pl.col("text").str.len_chars() > 200)
    drawn = long.sample(sum(most), seed=seed, shuffle=True)["text"].to_list()
    # More of them are the same ones and others, so that a difference is what the others cost.
    texts, asked = drawn[:documents], drawn[most[0] : most[0] + queries]

    def pair(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = make_batch(make_rows(range(len(texts)), tokenizer.encode(texts), settings.context, "cut"))
        return batch.tokens, batch.targets

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=settings.learning_rate, betas=(0.9, 0.95))

    config = GPTConfig(tokenizer.size, settings.context, settings.layers, settings.heads, settings.width)
    data = pair(texts)
    training = SubsetTraining(adamw, epochs=settings.passes, batch=settings.batch)
    loop = SubsetLoop(lambda: GPT(config), row_losses, data, training, seed)
    return Task(row_losses, data, pair(asked), loop, together=together, texts=(texts, asked))


def seconds_of(work: Callable[[], object]) -> float:
    """Time of the processor, with one thread the wall time of an idle core, whatever runs beside it."""
    started = time.process_time()
    work()
    return time.process_time() - started


def slope(few: list[float], many: list[float], more: int) -> dict[str, float]:
    """Seconds for one more, and the least and the most that any two rounds would say.

    Args:
        few: seconds of each round.
        many: the same with `more` more.
        more: how many.
    """
    return {
        "seconds": (median(many) - median(few)) / more,
        "low": (min(many) - max(few)) / more,
        "high": (max(many) - min(few)) / more,
    }


def memory(name: str) -> float:
    """A line of the process's own account, in MiB."""
    (line,) = (line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) / MIB


def measure(settings: CostSettings, name: str, seed: int) -> dict[str, Any]:
    """One method, in this process."""
    torch.set_num_threads(1)
    measured, tokenizer = METHODS[name], tokenizer_of(settings)
    method = measured.make(settings.rank)

    def task(documents: int = 1, queries: int = 1) -> Task:
        return task_of(
            settings,
            tokenizer,
            seed,
            measured.together,
            documents * settings.documents,
            queries * settings.queries,
        )

    base = task()
    if reason := unavailable(method, base):
        return {"method": name, "reason": reason, "process": time.process_time()}
    base.loop.train()  # the first one also pays for what a process does once
    _ = base.trained
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = memory("VmRSS:")
    try:
        method.scores(base)
    except AssayError as error:
        return {"method": name, "reason": str(error).splitlines()[0], "process": time.process_time()}
    peak = max(memory("VmHWM:") - before, 0.0)  # what was free before may have gone back meanwhile

    tasks = {"base": base}
    if settings.more_documents > 1:
        tasks["documents"] = task(documents=settings.more_documents)
    if settings.more_queries > 1:
        tasks["queries"] = task(queries=settings.more_queries)
    plain: dict[str, list[float]] = {work: [] for work in tasks}
    own: dict[str, list[float]] = {work: [] for work in tasks}
    for of in tasks.values():
        _ = of.trained
    for _ in range(settings.rounds):  # each round all of them: what slows the machine slows them alike
        for work, of in tasks.items():
            if measured.watches or work == "base":
                plain[work].append(seconds_of(of.loop.train))
            spent = seconds_of(partial(method.scores, of))
            own[work].append(spent - (plain[work][-1] if measured.watches else 0.0))

    found = {"method": name, "watches": measured.watches, "together": measured.together}
    found |= {"plain": median(plain["base"]), "seconds": median(own["base"]), "memory": peak}
    for work, more in (
        ("documents", (settings.more_documents - 1) * settings.documents),
        ("queries", (settings.more_queries - 1) * settings.queries),
    ):
        if work in tasks:
            found[f"one_of_{work}"] = slope(own["base"], own[work], more)
    return found | {"rounds": own, "process": time.process_time()}


def one(settings: CostSettings, seed: int, cache: Path) -> dict[str, Any]:
    """Every method in turn."""
    pieces, context = Pieces(cache / "cost" / f"seed{seed}", settings), multiprocessing.get_context("spawn")

    def apart(name: str) -> dict[str, Any]:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            return process.submit(measure, settings, name, seed).result()

    rows = [pieces.once(name, partial(apart, name)) for name in settings.methods or METHODS]
    return {"rows": rows, "found_seconds": sum(row["process"] for row in rows)}


def over_seeds(values: list[Any]) -> Any:
    """The median of numbers over the seeds; of what has numbers inside, each number's; of the rest, the first."""
    if isinstance(values[0], dict):
        return {key: over_seeds([value[key] for value in values]) for key in values[0]}
    return median(values) if isinstance(values[0], float) else values[0]


def summary(settings: CostSettings, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds; what retraining costs follows from the plain training."""
    table = [
        over_seeds([{key: value for key, value in row.items() if key != "rounds"} for row in rows])
        for rows in zip(*(seed["rows"] for seed in seeds), strict=True)
    ]
    plain = median([row["plain"] for row in table if "plain" in row])
    return {"table": table, "plain": plain}


if __name__ == "__main__":
    run_seeds_as_command("cost", "evidence.cost", (CostSettings, SETTINGS), one, summary)
