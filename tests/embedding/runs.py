"""Small recorded runs in float64, and the same numbers by dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.embedding.recorded import Recorded

SAMPLES, CLASSES, BATCH, STEPS = 24, 3, 4, 9


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "decayed": lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05),
    "maximized": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, betas=(0.8, 0.9)),
}


def order() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    epochs = [torch.randperm(SAMPLES, generator=generator) for _ in range(2)]
    return [rows.tolist() for rows in torch.cat(epochs).split(BATCH)][:STEPS]


def record(
    optimizer: str = "sgd",
    out: Any = None,
    clip: float | None = None,
    methods: Sequence[Any] = (),
    **settings: Any,
) -> tuple[nn.Module, assay.Run]:
    """A run of `STEPS` steps."""
    model = network()
    opt = OPTIMIZERS[optimizer](model.parameters())
    settings = {"projection": assay.Projection(kind="none"), "dtype": "fp64"} | settings
    run = assay.Run(model, opt, out=out, methods=[*methods, assay.DataValueEmbedding(**settings)])
    x, y = data()
    for ids in order():
        with run.step(ids):
            loss_fn(model, (x[ids], y[ids])).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    run.close()
    return model, run


def recorded(run: assay.Run) -> Recorded:
    return Recorded(run.writer.gradients)


def dense_embeddings(found: Recorded, curvature: str, blocks: str, momentum: bool) -> Tensor:
    """`[rows, width]`: by explicit products of the transitions of the whole state, one matrix per step.

    The state is (w, n) with n the buffer of preconditioned gradients; without momentum n is not read.
    """
    header, width = found.header, found.header.width
    entries = header.entries()
    mask = torch.ones(width, width, dtype=torch.float64)
    if blocks == "layer":
        mask = torch.block_diag(*[torch.ones(x.width, x.width, dtype=torch.float64) for x in header.layers])
    transitions, entering = [], []
    for step in found.steps:
        s, c, rho, k, beta, pull, _ = step.scalars[entries].unbind(1)
        if not momentum:
            k, beta = torch.zeros_like(k), torch.zeros_like(beta)
        rows = found.read(step.start, step.stop)
        each = 2 if header.preconditioned else 1
        g, Dg = rows[:, 0], rows[:, each - 1]
        if curvature == "fisher":
            DH = (Dg / found.weights[step.start : step.stop, None]).t() @ g
        else:
            j, Dj = rows[:, each::each].flatten(0, 1), rows[:, 2 * each - 1 :: each].flatten(0, 1)
            DH = Dj.t() @ j
        DH = torch.diag(c) @ (DH * mask) + torch.diag(pull)
        w_row = torch.cat([torch.diag(rho) - torch.diag(s) @ DH, -torch.diag(s * k)], 1)
        n_row = torch.cat([DH, torch.diag(beta)], 1)
        transitions.append(torch.cat([w_row, n_row]))  # [2 width, 2 width]
        left_out = (Dg * c).t()  # the gradient is missing: w stays higher by s, n lower
        entering.append(torch.cat([torch.diag(s) @ left_out, -left_out]))
    found_rows, product = [], torch.eye(2 * width, dtype=torch.float64)
    for transition, enter in zip(reversed(transitions), reversed(entering), strict=True):
        found_rows.append((product @ enter)[:width].t())
        product = product @ transition
    return torch.cat(found_rows[::-1])
