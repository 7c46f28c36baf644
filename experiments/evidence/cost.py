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
    slopes: bool
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
    frame = pile().filter(pl.col("text").str.len_chars() > 200).sample(documents + queries, seed=seed)
    texts, asked = frame["text"].to_list()[:documents], frame["text"].to_list()[documents:]

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


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """The median time of the processor, with one thread the wall time of an idle core, whatever runs beside it."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return median(found)


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
    plain = seconds_of(base.loop.train, settings.rounds)
    _ = base.trained
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = memory("VmRSS:")
    try:
        method.scores(base)
    except AssayError as error:
        return {"method": name, "reason": str(error).splitlines()[0], "process": time.process_time()}
    peak = memory("VmHWM:") - before

    def own(of: Task, rounds: int) -> float:
        _ = of.trained
        spent = seconds_of(lambda: method.scores(of), rounds)
        return spent - (seconds_of(of.loop.train, rounds) if measured.watches else 0.0)

    seconds = own(base, settings.rounds)
    found = {"method": name, "watches": measured.watches, "together": measured.together}
    found |= {"plain": plain, "seconds": seconds, "memory": peak}
    if settings.slopes:
        found["documents_slope"] = (own(task(documents=2), 1) - seconds) / settings.documents
        found["queries_slope"] = (own(task(queries=2), 1) - seconds) / settings.queries
    return found | {"process": time.process_time()}


def one(settings: CostSettings, seed: int, cache: Path) -> dict[str, Any]:
    """Every method in turn."""
    pieces, context = Pieces(cache / "cost" / f"seed{seed}", settings), multiprocessing.get_context("spawn")

    def apart(name: str) -> dict[str, Any]:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            return process.submit(measure, settings, name, seed).result()

    rows = [pieces.once(name, partial(apart, name)) for name in settings.methods or METHODS]
    return {"rows": rows, "found_seconds": sum(row["process"] for row in rows)}


def summary(settings: CostSettings, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds; what retraining costs follows from the plain training."""
    table = []
    for rows in zip(*(seed["rows"] for seed in seeds), strict=True):
        first: dict[str, Any] = rows[0]
        numbers = {
            key: median([row[key] for row in rows])
            for key, value in first.items()
            if isinstance(value, float)
        }
        table.append(first | numbers)
    plain = median([row["plain"] for row in table if "plain" in row])
    return {"table": table, "plain": plain}


if __name__ == "__main__":
    run_seeds_as_command("cost", "evidence.cost", (CostSettings, SETTINGS), one, summary)
