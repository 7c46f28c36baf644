"""The training loop of ``assay train``: a plain one, with assay's two lines in it."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import assay
from assay.demo import GPT
from assay.train.batches import Batch, Id, Row, batch_rows, make_batch, make_rows
from assay.train.config import Config, Training
from assay.train.data import fingerprint, hold_out, read_documents
from assay.train.influence import keep_curves, loss_of_pair, pair
from assay.train.model import build_model, pick_device, save_model, token_mean_loss
from assay.train.overhead import OverheadMeter, now
from assay.train.tokenizer import Tokenizer

__all__ = ["Progress", "Result", "Setup", "prepare", "train"]

AXES = 64  # rows whose gradients give the axes of the projection
Group = tuple[list[Id], Batch]

EXPLAINED_EVERY = 20
"""Steps between two readings of the explained share, which books what waits."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps in all.
        loss: training loss of the step, in nats per token.
        tokens_per_second: over the last steps, with assay on.
        overhead: see :class:`OverheadMeter`; None before the first comparison.
        explained: share of the targets' loss drop that the account explains so far, the one furthest from 1; None
            before it is known.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    overhead: float | None
    explained: float | None = None


@dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        ledger: every value that was recorded.
        documents: what was trained on: id, text and the metadata.
        targets: names of the targets.
        by: the metadata column that the targets are values of, if there is one.
        steps: optimizer steps done.
        seconds: wall time of the training loop.
        overhead: see :class:`OverheadMeter`; None where nothing was compared.
        comparisons: on how many steps the overhead rests.
        interrupted: whether the user stopped the run.
        out: the run folder.
    """

    ledger: Any
    documents: pl.DataFrame
    targets: list[str]
    by: str | None
    steps: int
    seconds: float
    overhead: float | None
    comparisons: int
    interrupted: bool
    out: Path


@dataclass(frozen=True)
class Setup:
    """Everything that training needs, made from the configuration."""

    config: Config
    device: torch.device
    model: nn.Module
    tokenizer: Tokenizer
    rows: list[Row]
    documents: pl.DataFrame
    targets: dict[str, Batch]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.config.train
        steps = train.epochs * ceil(ceil(len(self.rows) / train.batch_size) / train.accumulate)
        return min(steps, train.steps or steps)


def train(config: Config, report: Callable[[Progress], None] = lambda progress: None) -> Result:
    """Train a language model and value every document that it was trained on.

    Ctrl-C ends the run early; what was recorded by then is kept and readable.

    Args:
        config: the whole configuration.
        report: called after every optimizer step.

    Raises:
        InputError: the data, the model or the device cannot be used.
        StoreError: the run folder already holds a run or cannot be written.
    """
    setup = prepare(config)
    optimizer, scheduler = make_optimizer(setup.model, config.train, setup.steps)
    run = assay.Run(
        setup.model,
        optimizer,
        out=config.out,
        methods=[
            assay.InRunShapley(
                targets={
                    name: assay.Target([batch], token_mean_loss) for name, batch in setup.targets.items()
                },
                path=config.attribution.path,
                momentum=config.attribution.momentum,
                tolerance=config.attribution.tolerance,
                refresh=config.attribution.refresh,
                target_gradient=config.attribution.target_gradient,
                granularity=config.attribution.granularity,
            ),
            *_embedding(setup),
        ],
        metadata=_metadata(setup),
        info=_describe(setup),
        snapshots=config.attribution.snapshots or ("auto" if config.attribution.embeddings else None),
    )
    meter = OverheadMeter(setup.model, config.attribution.measure_every)
    start, steps, interrupted = time.perf_counter(), 0, False
    try:
        for done in _steps(setup, optimizer, scheduler, run, meter, report):
            steps = done
    except KeyboardInterrupt:
        interrupted = True
    finally:
        seconds = time.perf_counter() - start
        with run:  # closes it, whatever the disk says to the summary
            run.writer.update_info({"summary": _summary(steps, seconds, meter)})
    save_model(setup.model, setup.tokenizer, config.out / "model")
    ledger = run.ledger
    if config.attribution.embeddings and steps:
        _keep_curves(setup, ledger)
        ledger = assay.open(config.out)
    return Result(
        ledger=ledger,
        documents=setup.documents,
        targets=list(setup.targets),
        by=config.targets.by,
        steps=steps,
        seconds=seconds,
        overhead=meter.overhead,
        comparisons=len(meter.ratios),
        interrupted=interrupted,
        out=config.out,
    )


def prepare(config: Config) -> Setup:
    """Read the data, learn the tokenizer, make the model and hold out the targets' documents.

    Raises:
        InputError: the data, the model or the device cannot be used.
    """
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    documents, held = hold_out(read_documents(config.data), config.targets, config.seed)
    model, tokenizer = build_model(config.model, documents["text"])

    def rows(frame: pl.DataFrame, context: int, long: Literal["split", "cut"]) -> list[Row]:
        return make_rows(frame["id"], tokenizer.encode(frame["text"]), context, long)

    context = config.model.context
    seen = min(context, config.targets.tokens or context)
    return Setup(
        config=config,
        device=device,
        model=model.to(device).train(),
        tokenizer=tokenizer,
        rows=rows(documents, context, config.data.long),
        documents=documents,
        targets={name: make_batch(rows(frame, seen, "cut")).to(device) for name, frame in held.items()},
    )


def _embedding(setup: Setup) -> list[assay.DataValueEmbedding]:
    """The second method, where it is asked for."""
    wanted = setup.config.attribution
    if not wanted.embeddings:
        return []
    logits = "head" if isinstance(setup.model, GPT) else None
    some = setup.rows[:: max(1, len(setup.rows) // AXES)][:AXES]
    batches = [pair(make_batch(some[i : i + 8]).to(setup.device)) for i in range(0, len(some), 8)]
    axes = assay.Target(batches, loss_of_pair)
    projection = assay.Projection(rank=wanted.rank, kind="pca", support=wanted.support)
    return [
        assay.DataValueEmbedding(
            projection, ranks=wanted.ranks, axes=axes, curvature=wanted.curvature, logits=logits
        )
    ]


def _keep_curves(setup: Setup, ledger: Any) -> None:
    """The influence-by-step curve of every target, for the report."""
    embeddings = ledger.embeddings(curvature=setup.config.attribution.curvature)
    curves = []
    for name, batch in setup.targets.items():
        scores = embeddings.influence(setup.model, [pair(batch)], loss_of_pair)
        curves.append(embeddings.by_step(scores).select(pl.lit(name).alias("query"), pl.all()))
    keep_curves(ledger, pl.concat(curves))


def _metadata(setup: Setup) -> pl.DataFrame:
    """What is known of the documents; with values by token also the text of each token, as `pieces`."""
    documents = setup.documents.unique("id", keep="first", maintain_order=True)
    if setup.config.attribution.granularity != "token":
        return documents
    context = setup.config.model.context
    pieces = [["", *parts][:context] for parts in setup.tokenizer.pieces(documents["text"].to_list())]
    return documents.with_columns(pieces=pl.Series(pieces, dtype=pl.List(pl.String)))


def make_optimizer(
    model: nn.Module, train: Training, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=train.learning_rate,
        betas=train.betas,
    )
    warmup = round(train.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return train.final_learning_rate + (1 - train.final_learning_rate) * (1 + cos(pi * done)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def groups(setup: Setup) -> Iterator[list[Group]]:
    """The micro-batches of each optimizer step."""
    train = setup.config.train
    generator = torch.Generator().manual_seed(setup.config.seed)
    for _ in range(train.epochs):
        group: list[Group] = []
        for rows in batch_rows(setup.rows, train.batch_size, generator):
            group.append(([row.id for row in rows], make_batch(rows).to(setup.device)))
            if len(group) == train.accumulate:
                yield group
                group = []
        if group:
            yield group


def _steps(
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    run: Any,
    meter: OverheadMeter,
    report: Callable[[Progress], None],
) -> Iterator[int]:
    """Take every step of the run, yielding how many are done."""
    model, train, device = setup.model, setup.config.train, setup.device

    def backward(batch: Batch, parts: int) -> float:
        loss = token_mean_loss(model, batch) / parts
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    rate, explained = 0.0, None
    for step, group in zip(range(setup.steps), groups(setup), strict=False):

        def plain(group: list[Group] = group) -> None:
            for _, batch in group:
                backward(batch, len(group))

        compared = meter.due(step)
        if compared:
            meter.before(plain, device)
            run.status()  # books what waits, which is no work of this step

        start, loss = now(device), 0.0
        for ids, batch in group:
            counted = (batch.targets >= 0).sum(1)
            with run.step(ids, counted / (counted.sum() * len(group))):
                loss += backward(batch, len(group))
        inside = run.status().seconds if compared else 0.0
        updating = now(device)
        norm = clip_grad_norm_(model.parameters(), train.clip or float("inf"))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        end = now(device)

        if compared:
            own = run.status().seconds - inside  # assay's part of the update
            meter.after(plain, device, step=end - start, update=end - updating - own)
        tokens = sum(int((batch.targets >= 0).sum()) for _, batch in group)
        speed = tokens / (end - start)
        rate = 0.9 * rate + 0.1 * speed if step else speed
        run.log({"loss": loss, "gradient_norm": float(norm), "tokens_per_second": speed})
        if step % EXPLAINED_EVERY == EXPLAINED_EVERY - 1:
            shares = [share for share in run.status().explained.values() if isfinite(share)]
            explained = max(shares, key=lambda share: abs(share - 1), default=None)
        report(Progress(step + 1, setup.steps, loss, rate, meter.overhead, explained))
        yield step + 1


def _summary(steps: int, seconds: float, meter: OverheadMeter) -> dict[str, Any]:
    """What the run took, for the report."""
    return {
        "optimizer steps": steps,
        "seconds": round(seconds, 1),
        "overhead of assay over a plain step": None if meter.overhead is None else round(meter.overhead, 3),
        "steps that were compared with a plain one": len(meter.ratios),
    }


def _describe(setup: Setup) -> dict[str, Any]:
    """What the run folder says of the run: enough to repeat it."""
    versions = {
        name: getattr(sys.modules[name], "__version__", "?")
        for name in ("assay", "torch", "polars", "numpy", "tokenizers", "transformers", "datasets")
        if name in sys.modules
    }
    return {
        "config": setup.config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **versions},
        "seed": setup.config.seed,
        "working_directory": str(Path.cwd()),
        "documents": setup.documents.height,
        "fingerprint": fingerprint(setup.documents),
        "parameters": sum(p.numel() for p in setup.model.parameters()),
        "targets": {name: list(batch.tokens.shape) for name, batch in setup.targets.items()},
    }
