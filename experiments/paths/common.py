"""What the experiments share: a tiny GPT on bytes of the embedded corpus, and how a result is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import polars as pl
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.optim import Optimizer

import assay
from assay.demo import CORPUS
from assay.demo.gpt import GPT, GPTConfig
from assay.evaluate import sample_gradients
from assay.optimizers import model_of

CONTEXT = 32

Moves = dict[nn.Parameter, Tensor]


def gpt(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """About 30,000 parameters: 2 layers of width 32 over bytes."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocabulary=128, context=CONTEXT, layers=2, heads=2, width=32)).to(dtype)


def rows(domain: str, count: int, skip: int = 0) -> Tensor:
    """`[count, CONTEXT + 1]` ASCII bytes from the documents of one domain, in order."""
    texts = pl.read_parquet(CORPUS).filter(pl.col("domain") == domain)["text"]
    data = bytes(c for text in texts for c in text.encode("ascii", "ignore"))
    size = CONTEXT + 1
    cut = torch.tensor(list(data[skip * size : (skip + count) * size]))
    return cut.view(count, size)


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, `[rows, CONTEXT + 1]`, in nats."""
    loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])
    return loss


def targets(domains: Sequence[str], count: int = 4) -> dict[str, assay.Target]:
    """Held-out rows of each domain, far behind those that are trained on."""
    return {name: assay.Target([rows(name, count, skip=4000)], loss_fn) for name in domains}


def mixture(domains: Sequence[str], count: int, seed: int) -> Tensor:
    """`[count, CONTEXT + 1]`: rows of all the domains, shuffled."""
    each = -(-count // len(domains))
    data = torch.cat([rows(name, each) for name in domains])
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))][:count]


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """As small GPTs are trained; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def copied(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """A model and its optimizer with its state, free of the originals."""
    return copy.deepcopy((model, optimizer))


def values_of_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[nn.Module], Tensor],
    samples: int,
    target: dict[str, assay.Target],
    path: str,
    clip: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """One step of copies with assay: `[samples]` values and the account's row, for the first target."""
    model, optimizer = copied(model, optimizer)
    method = assay.InRunShapley(target, path=path)
    with assay.Run(model, optimizer, methods=[method], check="off") as run:
        with run.step(range(samples)):
            loss(model).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    name = next(iter(target))
    (account,) = run.ledger.account(name).drop("status").iter_rows(named=True)
    return torch.tensor(run.ledger.steps(name).sort("id")["value"].to_list()).double(), account


def moves_of_step(
    model: nn.Module, optimizer: Optimizer, part: Callable[[int], Tensor], samples: int
) -> Moves:
    """`{parameter: [samples + 2, *shape]}`: K g_i of every sample, then what is carried and what is decayed."""
    params = list(model.parameters())
    gradients = sample_gradients(part, samples, params)
    linear = model_of(optimizer)
    moves = {}
    for p in params:
        split = linear.split(p, gradients[p].sum(0))
        own = linear.lr(linear.group_index(p)) * split.gain * gradients[p]
        rest = [
            torch.as_tensor(x, dtype=p.dtype).expand_as(p).detach() for x in (split.carried, split.decayed)
        ]
        moves[p] = torch.cat([own, torch.stack(rest)])
    return moves


def rmse(found: Tensor, truth: Tensor) -> float:
    """Root mean square error."""
    return float((found - truth).square().mean().sqrt())


def spearman(found: Tensor, truth: Tensor) -> float:
    """Rank correlation."""
    return float(spearmanr(found, truth).statistic)


def pearson(found: Tensor, truth: Tensor) -> float:
    """Linear correlation."""
    return float(pearsonr(found, truth).statistic)
