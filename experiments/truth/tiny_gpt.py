"""A GPT of 30,000 parameters on bytes of the embedded corpus: AdamW, clipping, warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from assay.evaluate import Removal, Training, leave_out
from experiments.paths.common import adamw, gpt, loss_fn, mixture, rows

DOMAINS = ("novels", "python_code", "formal_math")
SAMPLES, BATCH, EPOCHS, QUERIES_EACH = 400, 8, 2, 4
LR, CLIP, WARM = 1e-3, 0.5, 10
STEPS = EPOCHS * SAMPLES // BATCH


@dataclass(frozen=True)
class Bytes:
    """The run's data: samples `[SAMPLES, 33]`, the ids of every step, and the queries."""

    samples: Tensor
    order: Sequence[Sequence[int]]
    queries: Sequence[Tensor]

    def batch(self, ids: Sequence[int]) -> Tensor:
        """These samples."""
        return self.samples[torch.tensor(ids)]


def corpus(seed: int = 0) -> Bytes:
    """Three domains, shuffled anew in each epoch; held-out rows of each as queries."""
    generator = torch.Generator().manual_seed(seed)
    order = [
        ids.tolist()
        for _ in range(EPOCHS)
        for ids in torch.randperm(SAMPLES, generator=generator).split(BATCH)
    ]
    queries = [row[None] for name in DOMAINS for row in rows(name, QUERIES_EACH, skip=4000)]
    return Bytes(mixture(DOMAINS, SAMPLES, seed), order, queries)


def network(seed: int = 0) -> nn.Module:
    """In float64."""
    return gpt(seed, torch.float64)


def rate(step: int) -> float:
    """What the peak learning rate is multiplied by."""
    if step < WARM:
        return (step + 1) / WARM
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - WARM) / (STEPS - WARM))) / 2


def terms(model: nn.Module, tokens: Tensor) -> Tensor:
    """`[B]`: each row's term of the mean over all tokens of the batch."""
    logits = model(tokens[:, :-1])  # [B, T, V]
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.view(len(tokens), -1).sum(1) / each.numel()


def optimizer_of(model: nn.Module) -> Optimizer:
    """AdamW 0.9/0.95, decay on matrices only."""
    return adamw(model, LR)


def training(data: Bytes, seed: int = 0) -> Training:
    """The run, to be repeated."""
    model = network(seed)
    batches = [[data.batch(ids)] for ids in data.order]
    return Training(model, optimizer_of(model), batches, terms, rates=lambda t: [LR * rate(t)] * 2, clip=CLIP)


def truth(data: Bytes, removed: Sequence[Removal], seed: int = 0, chunk: int = 16) -> Tensor:
    """`[queries, removals]`: by how much each removal raises each query's loss."""
    return leave_out(training(data, seed), removed, data.queries, loss_fn, chunk=chunk)
