"""Pretraining on the mini-Pile, for curation and composition: documents, a small GPT, the run that values them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil, cos, pi
from pathlib import Path
from shutil import rmtree

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

import assay
from assay.demo.gpt import GPT, IGNORED, GPTConfig
from assay.train.batches import Batch, make_batch, make_rows
from assay.train.tokenizer import learn_tokenizer
from experiments.settings import TextSettings

PILE = Path(__file__).parents[3] / "shared" / "data" / "minipile.parquet"
HEAD = 400  # characters of a document that are read: more than a row's tokens take


class PileSettings(TextSettings):
    """Documents of each domain, the model, its training, and how it is watched."""

    documents: int
    target_documents: int
    test_documents: int
    warmup: float
    weight_decay: float
    clip: float
    path: str
    evaluations: int
    windows: int


@dataclass(frozen=True)
class Corpus:
    """One seed's documents, each the row of its first tokens; a document's id is its place.

    Args:
        domains: the domain of every training document.
        train: the training documents.
        targets: by domain, what is valued for.
        test: held-out documents of all domains.
        vocabulary: number of token ids.
    """

    domains: list[str]
    train: Batch
    targets: dict[str, Batch]
    test: Batch
    vocabulary: int

    def __len__(self) -> int:
        return len(self.domains)


@dataclass(frozen=True)
class Training:
    """What a training left.

    Args:
        curve: by evaluation, the steps done, the tokens trained on, and the test loss in nats per token.
        model: at the end.
        test: `[test documents]` losses at the end.
    """

    curve: list[tuple[int, int, float]]
    model: GPT
    test: Tensor


@cache
def pile() -> pl.DataFrame:
    """The mini-Pile, the beginning of every document."""
    return pl.read_parquet(PILE).select("domain", text=pl.col("text").str.slice(0, HEAD))


def draw(settings: PileSettings, seed: int) -> Corpus:
    """The documents of a seed, equally many of every domain."""
    parts: dict[str, list[pl.DataFrame]] = {"train": [], "target": [], "test": []}
    sizes = (settings.documents, settings.target_documents, settings.test_documents)
    for domain in sorted(pile()["domain"].unique()):
        drawn = pile().filter(pl.col("domain") == domain).unique("text", maintain_order=True)
        drawn = drawn.sample(sum(sizes), seed=seed, shuffle=True)
        start = 0
        for name, size in zip(parts, sizes, strict=True):
            parts[name].append(drawn[start : start + size])
            start += size
    train, target, test = (pl.concat(part) for part in parts.values())
    tokenizer = learn_tokenizer(train["text"], settings.vocabulary)

    def batch(frame: pl.DataFrame) -> Batch:
        rows = make_rows(range(frame.height), tokenizer.encode(frame["text"]), settings.context, "cut")
        return make_batch(rows)

    targets = {str(name): batch(frame) for (name,), frame in target.group_by("domain", maintain_order=True)}
    return Corpus(train["domain"].to_list(), batch(train), targets, batch(test), tokenizer.size)


def rows(batch: Batch, ids: Tensor) -> Batch:
    """Some documents."""
    return Batch(batch.tokens[ids], batch.targets[ids])


def loss_fn(model: GPT, batch: Batch) -> Tensor:
    """Mean cross-entropy over the tokens of a batch, in nats."""
    loss: Tensor = model(batch.tokens, batch.targets)
    return loss


def row_losses(model: GPT, rows: tuple[Tensor, Tensor]) -> Tensor:
    """`[B]`: each row's mean cross-entropy over its tokens."""
    tokens, targets = rows
    each = F.cross_entropy(model(tokens).transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return each.sum(1) / (targets != IGNORED).sum(1)


@torch.no_grad()
def losses(model: GPT, batch: Batch) -> Tensor:
    """`[documents]`: mean cross-entropy over the tokens of each."""
    found = []
    for part in torch.arange(len(batch.tokens)).split(64):  # type: ignore[no-untyped-call]
        found.append(row_losses(model, (batch.tokens[part], batch.targets[part])))
    return torch.cat(found)


def steps_of(settings: PileSettings, corpus: Corpus) -> int:
    """Optimizer steps of every training: what all documents take."""
    return ceil(len(corpus) * settings.passes / settings.batch)


def order(settings: PileSettings, corpus: Corpus, kept: Tensor, seed: int) -> Tensor:
    """`[steps, batch]` ids: the same shuffled passes for every choice of documents, without those left out.

    Fewer documents come round more often: the number of steps is that of all documents.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = steps_of(settings, corpus) * settings.batch
    stays = torch.zeros(len(corpus), dtype=torch.bool)
    stays[kept] = True
    taken: list[Tensor] = []
    while sum(map(len, taken)) < wanted:
        each = torch.randperm(len(corpus), generator=generator)
        taken.append(each[stays[each]])
    return torch.cat(taken)[:wanted].view(-1, settings.batch)


def rate(settings: PileSettings, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth, as a fraction of the peak."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup))) / 2


Watch = Callable[[GPT, torch.optim.Optimizer], assay.Run]


def learn(
    settings: PileSettings,
    corpus: Corpus,
    kept: Tensor,
    seed: int,
    watch: Watch | None = None,
    order_seed: int | None = None,
) -> Training:
    """Train on the documents that are kept: a seed's weights, and its order if no other is named."""
    torch.manual_seed(seed)
    config = GPTConfig(corpus.vocabulary, settings.context, settings.layers, settings.heads, settings.width)
    model = GPT(config)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    seen = order(settings, corpus, kept, seed if order_seed is None else order_seed)
    evaluated = {round(n * len(seen) / settings.evaluations) for n in range(1, settings.evaluations + 1)}
    run = None if watch is None else watch(model, optimizer)
    curve: list[tuple[int, int, float]] = []
    tokens = 0
    for step, ids in enumerate(seen):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(settings, step, len(seen))
        batch = rows(corpus.train, ids)
        counted = (batch.targets != IGNORED).sum(1)
        if run is None:
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        else:
            with run.step(ids.tolist(), counted / counted.sum()):
                loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(counted.sum())
        if step + 1 in evaluated:
            curve.append((step + 1, tokens, float(losses(model, corpus.test).mean())))
    if run is not None:
        run.close()
    return Training(curve, model, losses(model, corpus.test))


def valued(settings: PileSettings, corpus: Corpus, seed: int, folder: Path) -> tuple[Training, assay.Ledger]:
    """Train on all documents and value each for every domain's target; the ledger stays in the folder."""
    if folder.exists():
        rmtree(folder)
    targets = {name: assay.Target([batch], loss_fn) for name, batch in corpus.targets.items()}
    metadata = pl.DataFrame({"id": range(len(corpus)), "domain": corpus.domains})

    def watch(model: GPT, optimizer: torch.optim.Optimizer) -> assay.Run:
        method = assay.InRunShapley(targets, settings.path)
        info = {"settings": settings.model_dump(mode="json"), "seed": seed}
        return assay.Run(model, optimizer, folder, [method], metadata=metadata, info=info, strict=True)

    training = learn(settings, corpus, torch.arange(len(corpus)), seed, watch)
    return training, assay.open(folder)


def values_by_step(ledger: assay.Ledger) -> pl.DataFrame:
    """`step`, `id`, and the value for every target by its name."""
    frames = [ledger.steps(name).select("step", "id", pl.col("value").alias(name)) for name in ledger.targets]
    first, *others = frames
    for frame in others:
        first = first.join(frame, on=["step", "id"])
    return first.sort("step", "id")
