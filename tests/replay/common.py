"""A small run with everything in it, and its truth by finite differences of the whole training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer

import assay

STEPS, ROWS = 9, 3
Batch = tuple[Tensor, Tensor]
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.2}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "adam": (Adam, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adamw": (AdamW, {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6}),
    "amsgrad": (AdamW, {"lr": 0.02, "betas": (0.8, 0.7), "amsgrad": True, "eps": 1e-6}),
}


class Net(nn.Module):
    """An embedding, a norm, dropout and a layer that is used twice."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.inner, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(self.norm(self.table(x))))
        hidden = F.dropout(torch.tanh(self.inner(hidden)), self.dropout, self.training)
        return self.head(hidden)  # type: ignore[no-any-return]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Problem:
    """A training run; `micro` micro-batches per step."""

    name: str
    clip: float | None = None
    micro: int = 1
    decay: float = 0.0
    schedule: bool = False
    dropout: float = 0.1

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return Net(self.dropout).double()

    def optimizer(self, model: nn.Module) -> Optimizer:
        kind, options = OPTIMIZERS[self.name]
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.decay},
            {"params": vectors, "lr": options["lr"] / 2},
        ]
        return kind(groups, **options)

    def rate(self, step: int) -> float:
        return (1 + math.cos(math.pi * step / STEPS)) / 2 + 0.1 if self.schedule else 1.0

    def batches(self, step: int) -> list[tuple[list[int], Batch]]:
        generator = torch.Generator().manual_seed(100 + step)
        result = []
        for m in range(self.micro):
            x = torch.randint(6, (ROWS,), generator=generator)
            y = torch.randint(3, (ROWS,), generator=generator)
            result.append(([100 * step + 10 * m + i for i in range(ROWS)], (x, y)))
        return result

    def queries(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(7)
        return [
            (torch.randint(6, (2,), generator=generator), torch.randint(3, (2,), generator=generator))
            for _ in range(3)
        ]

    def train(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        backward: Callable[[int, int, Batch], None],
    ) -> None:
        """A user's loop; `backward(step, micro, batch)` does forward and backward."""
        torch.manual_seed(3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        for step in range(STEPS):
            for m, (_, batch) in enumerate(self.batches(step)):
                backward(step, m, batch)
            if self.clip is not None:
                clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    def recorded(self, out: Any = None, **options: Any) -> tuple[assay.Ledger, nn.Module, Optimizer]:
        """The run with snapshots."""
        model = self.model()
        optimizer = self.optimizer(model)
        with assay.Run(
            model, optimizer, out=out, snapshots=options.pop("snapshots", "auto"), **options
        ) as run:

            def backward(step: int, m: int, batch: Batch) -> None:
                with run.step(self.batches(step)[m][0]):
                    (loss_fn(model, batch) / self.micro).backward()

            self.train(model, optimizer, backward)
        return run.ledger, model, optimizer

    def losses(self, weights: Mapping[tuple[int, int], float]) -> Tensor:
        """`[queries]` after training with some samples' terms weighted; keys are (step, row of the step)."""
        model = self.model()

        def backward(step: int, m: int, batch: Batch) -> None:
            terms = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
            factors = torch.tensor(
                [weights.get((step, m * ROWS + i), 1.0) for i in range(ROWS)], dtype=torch.float64
            )
            ((factors * terms).mean() / self.micro).backward()

        self.train(model, self.optimizer(model), backward)
        model.eval()
        with torch.no_grad():
            return torch.stack([loss_fn(model, q) for q in self.queries()])

    def differences(self, places: list[tuple[int, int]], h: float = 1e-5) -> Tensor:
        """`[queries, places]`: −∂ loss after training / ∂ weight of one sample's term."""
        columns = [(self.losses({place: 1 - h}) - self.losses({place: 1 + h})) / (2 * h) for place in places]
        return torch.stack(columns, 1)


class Cubed(torch.autograd.Function):
    """An operation without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient
