"""Whether values are any better than chance: the run of a configuration, trained again on halves of its data.

Every document is one row here: of a longer one its beginning counts (``data.long: cut``).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import assay
from assay.demo import GPT, IGNORED
from assay.errors import InputError
from assay.evaluate.baselines import (
    BM25,
    Cosine,
    DotProduct,
    Embeddings,
    FinalLoss,
    Given,
    Influence,
    InRun,
    Random,
    Scorer,
    Scores,
    TextSimilarity,
    score,
)
from assay.evaluate.cache import Cache
from assay.evaluate.compare import Compared, compare, recommended
from assay.evaluate.fingerprint import called, fingerprint
from assay.evaluate.subsets import Losses, SubsetTruth, draw_subsets
from assay.evaluate.task import Checkpoint, Task, Watched, checkpoint
from assay.methods.base import Method
from assay.train.batches import Batch, Row, make_batch
from assay.train.config import Config, override
from assay.train.data import hold_out, read_documents
from assay.train.loop import Group, Setup, groups, make_optimizer, prepare
from assay.train.model import token_mean_loss
from assay.workers import Local, Workers

__all__ = [
    "QUICK",
    "SETTINGS",
    "Evaluation",
    "LanguageLoop",
    "advice",
    "document_losses",
    "evaluate",
    "quick_form",
    "task_of",
]

QUICK = {"data.limit": 96, "train.epochs": 1, "targets.documents": 4}
"""What ``--quick`` allows at most of each."""

SETTINGS: dict[str, str] = {
    "in-run, left": "attribution.path: left",
    "in-run, trapezoid": "attribution.path: trapezoid",
    "in-run, trapezoid, momentum sketch": "attribution.path: trapezoid and attribution.momentum: sketch",
    "in-run, hessian": "attribution.path: hessian",
    "embeddings, fisher": "attribution.embeddings: true, and then assay influence",
    "LoGra": "assay index and assay search, on the trained model",
    "dot product": "assay index with --projection none",
    "cosine": "assay index with --projection none, and assay search --normalize unit",
}
"""How a user gets the values of a method."""


def document_losses(model: Module, rows: Any) -> Tensor:
    """`[B]`: each document's mean cross-entropy per token, in nats, of `(tokens, targets)`."""
    tokens, targets = rows
    logits = model(tokens) if isinstance(model, GPT) else model(input_ids=tokens).logits
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    mean: Tensor = each.sum(1) / targets.ne(IGNORED).sum(1).clamp(min=1)
    return mean


def quick_form(config: Config) -> Config:
    """A small form of the same run, for a first look.

    Example:
        >>> quick_form(Config(out="runs/mine", data={"path": "texts", "limit": 50})).data.limit
        50
    """
    has = {
        "data.limit": config.data.limit, "train.epochs": config.train.epochs,
        "targets.documents": config.targets.documents,
    }  # fmt: skip
    return override(config, {key: min(most, has[key] or most) for key, most in QUICK.items()})


class LanguageLoop:
    """The training of a configuration, as methods are compared on it: documents are rows, ids their places.

    Args:
        setup: of the run.
    """

    def __init__(self, setup: Setup) -> None:
        rows = [Row(i, row.tokens) for i, row in enumerate(setup.rows)]
        self.setup = replace(setup, rows=rows)

    def train(self, methods: Sequence[Method] = (), snapshots: str | int | None = None) -> Watched:
        """See `assay.evaluate.task.Loop`."""
        return self.train_on(None, self.setup.config.seed, methods, snapshots)

    def train_on(
        self,
        kept: Tensor | None,
        seed: int,
        methods: Sequence[Method] = (),
        snapshots: str | int | None = None,
    ) -> Watched:
        """Train on some documents, in the order and with the schedule of the whole: the others are left out of batches.

        Args:
            kept: `[N]` bool; None keeps all.
            seed: of the order.
            methods: that watch.
            snapshots: that are taken.
        """
        setup = self.setup
        config = setup.config.train
        model = copy.deepcopy(setup.model).train()
        optimizer, scheduler = make_optimizer(model, config, setup.steps)
        run = (
            assay.Run(model, optimizer, methods=methods, snapshots=snapshots)
            if methods or snapshots
            else None
        )
        seeded = replace(setup, config=setup.config.model_copy(update={"seed": seed}))
        order = [group for _, group in zip(range(setup.steps), groups(seeded), strict=False)]
        if kept is not None:
            order = [[part for part in (_only(*part, kept) for part in group) if part[0]] for group in order]
        each = max(1, len(order) // max(1, config.epochs))
        checkpoints, rates = list[Checkpoint](), list[float]()
        torch.manual_seed(seed)  # of dropout
        for t, group in enumerate(order):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            for ids, batch in group:
                counted = (batch.targets >= 0).sum(1)
                with nullcontext() if run is None else run.step(ids, counted / (counted.sum() * len(group))):
                    (token_mean_loss(model, batch) / len(group)).backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(model.parameters(), config.clip or float("inf"))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if (t + 1) % each == 0 or t + 1 == len(order):
                checkpoints.append(checkpoint(model, rates))
                rates = []
        if run is not None:
            run.close()
        ledger = None if run is None else run.ledger
        return Watched(model.eval(), optimizer, lambda t: order[t], token_mean_loss, checkpoints, ledger)

    def retrain(
        self,
        kept: Tensor,
        queries: Any,
        measure: Losses,
        *,
        seeds: Sequence[int] = (0,),
        cache: str | Path | None = None,
        workers: Workers | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """See `assay.evaluate.task.Loop`; a seed is that of the order, the first weights are always the same."""
        known = Cache(cache, {} if cache is None else self._settings(kept, queries, measure))
        names = {(seed, s): f"seed-{seed}-{s:06d}" for seed in seeds for s in range(len(kept))}
        done = {place: known.read(name) for place, name in names.items()}
        tasks = (
            (self, kept[s], queries, measure, seed) for (seed, s), found in done.items() if found is None
        )
        fresh = (workers or Local(1)).run(_retrained, tasks)
        parts: dict[int, list[Tensor]] = {seed: [] for seed in seeds}
        for number, ((seed, s), found) in enumerate(done.items(), start=1):
            if found is None:
                found = next(fresh)
                known.write(names[seed, s], found)
            parts[seed].append(found)
            if progress is not None:
                progress(number, len(done))
        return torch.stack([torch.stack(part) for part in parts.values()])

    def _settings(self, kept: Tensor, queries: Any, measure: Losses) -> dict[str, Any]:
        return {
            "config": self.setup.config.model_dump(mode="json", exclude={"out", "data", "attribution"}),
            "data": fingerprint([torch.tensor(row.tokens) for row in self.setup.rows]),
            "queries": fingerprint(queries),
            "kept": fingerprint(kept),
            "model": fingerprint(self.setup.model.state_dict()),
            "measure": called(measure),
        }


def _only(ids: list[Any], batch: Batch, kept: Tensor) -> Group:
    """The kept rows of a micro-batch."""
    rows = kept[torch.tensor(ids)]
    own = rows.to(batch.tokens.device)
    return [i for i, keep in zip(ids, rows.tolist(), strict=True) if keep], Batch(
        batch.tokens[own], batch.targets[own]
    )


def _retrained(loop: LanguageLoop, kept: Tensor, queries: Any, measure: Losses, seed: int) -> Tensor:
    """`[Q, …]`: one training on the kept documents, and what is measured of it."""
    model = loop.train_on(kept, seed).model
    with torch.no_grad():
        return measure(model, queries).double().cpu()


def task_of(config: Config) -> tuple[Task, Setup]:
    """The documents, the held-out documents by target, and the training of a configuration.

    Raises:
        InputError: the data, the model or the device cannot be used.
    """
    setup = prepare(override(config, {"data.long": "cut"}))
    loop = LanguageLoop(setup)
    batch = make_batch(loop.setup.rows).to(setup.device)
    longest = max(part.tokens.shape[1] for part in setup.targets.values())
    asked = [
        torch.cat([F.pad(getattr(part, name), (0, longest - part.tokens.shape[1]), value=filling) for part in
                   setup.targets.values()])
        for name, filling in (("tokens", 0), ("targets", IGNORED))
    ]  # fmt: skip
    which = [g for g, part in enumerate(setup.targets.values()) for _ in range(len(part.tokens))]
    documents, held = hold_out(read_documents(config.data), config.targets, config.seed)
    texts = (documents["text"].to_list(), [text for frame in held.values() for text in frame["text"]])
    task = Task(
        document_losses, (batch.tokens, batch.targets), (asked[0], asked[1]), loop, groups=which,
        texts=texts, outputs="head" if isinstance(setup.model, GPT) else None,
    )  # fmt: skip
    return task, setup


def methods_of(task: Task, setup: Setup, quick: bool = False) -> list[Scorer]:
    """What is compared: assay's own methods with their settings, and what any of them has to beat.

    Args:
        task: what is asked.
        setup: of the run.
        quick: leave out the sentence embeddings, which take long to load.
    """
    length = task.data[1].ne(IGNORED).sum(1).double()[None]
    found: list[Scorer] = [
        Random(setup.config.seed), Given("length of the document", length.cpu()), FinalLoss(), DotProduct(), Cosine(),
        Influence("logra"), InRun("left"), InRun("trapezoid"), InRun("trapezoid", "sketch"), Embeddings("fisher"),
    ]  # fmt: skip
    return [*found, BM25(), *([] if quick else [TextSimilarity()])]


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Args:
        rows: methods, the best first.
        failed: methods that could not be asked, and why.
        documents: how many were valued.
        targets: their names.
        subsets: on how many halves was trained.
        plain: seconds of one training that nothing watches.
        seconds: of everything.
    """

    rows: list[Compared]
    failed: dict[str, str]
    documents: int
    targets: list[str]
    subsets: int
    plain: float
    seconds: float


def evaluate(
    config: Config,
    *,
    subsets: int = 32,
    quick: bool = False,
    cache: str | Path | None = None,
    workers: Workers | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Train on everything, ask every method, train on random halves, and compare.

    The halves are trained on in the order and with the schedule of the run itself, so that the score is about this run
    and not about others like it. Costs about half a training for each, and one for each method that watches.

    Args:
        config: of the run; its folder is not touched.
        subsets: halves that are trained on.
        quick: leave out methods that take long to load.
        cache: a folder that keeps the trainings.
        workers: who train.
        say: called with a line now and then.

    Raises:
        InputError: the data, the model or the device cannot be used, or there are too few subsets or documents.
        StoreError: the cache belongs to other data or settings.
    """
    started = time.perf_counter()
    if subsets < 5:
        raise InputError(f"--subsets {subsets}: nothing can be said of fewer than 5.")
    task, setup = task_of(config)
    if task.examples < 8:
        raise InputError(
            f"{task.examples} documents are too few to train on halves of them: give at least 8."
        )
    before = time.perf_counter()
    _ = task.trained
    plain = time.perf_counter() - before
    methods = methods_of(task, setup, quick)
    watching = sum(isinstance(method, InRun | Embeddings) for method in methods)
    say(
        f"{task.examples} documents, targets {', '.join(setup.targets)}; one training takes {plain:.1f} s, so that "
        f"{subsets} on halves and {watching} that are watched are about "
        f"{(subsets / 2 / (workers.number if workers else 1) + 2 * watching) * plain / 60:.1f} minutes"
    )
    scores, failed = list[Scores](), dict[str, str]()
    for method in methods:
        try:
            scores.append(score(method, task))
            say(f"{method.name}: {scores[-1].seconds:.1f} s")
        except Exception as error:  # one method that cannot take this model leaves the others
            failed[method.name] = " ".join(f"{error}".split())[:120] or type(error).__name__
    kept = draw_subsets(task.examples, subsets, seed=config.seed)
    losses = task.loop.retrain(
        kept, task.queries, task.losses, seeds=(config.seed,), cache=cache, workers=workers,
        progress=lambda done, of: say(f"trained on {done} of {of} halves") if done * 4 % of < 4 else None,
    ).mean(0)  # fmt: skip
    truth = SubsetTruth(kept, task.merged(losses.t()).t())
    rows = compare(scores, truth)
    seconds = time.perf_counter() - started
    return Evaluation(rows, failed, task.examples, list(setup.targets), subsets, plain, seconds)


def advice(found: Evaluation) -> str:
    """What to take, in a sentence or two."""
    chosen = recommended(found.rows, matters=max(10.0, found.plain / 4))
    if chosen is None:
        return (
            f"None of these can be told from chance by {found.subsets} retrainings: give more of them (--subsets), "
            "more held-out documents per target (targets.documents) or a longer training, and do not act on values."
        )
    how = SETTINGS.get(chosen.name)
    best = found.rows[0]
    text = f"Take {chosen.name}" + (f" ({how})" if how else "") + f": LDS {chosen.lds:.2f}, "
    text += (
        "the best"
        if chosen is best
        else f"which is not shown to be worse than {best.name} ({best.lds:.2f}), and cheaper"
    )
    if how is None:
        own = next((row for row in found.rows if row.name in SETTINGS and row.better_than_chance), None)
        text += ". It knows nothing of the training: on this data a simple baseline does as well"
        text += f"; the best of assay's own is {own.name} ({own.lds:.2f})" if own else " as anything here"
    return text + "."
