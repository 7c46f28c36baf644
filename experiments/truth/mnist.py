"""A perceptron on 1,000 real digits, small enough to be trained again for every sample that is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from assay.evaluate import Removal, Training, leave_out

DATA = Path(__file__).parents[3] / "shared" / "data" / "mnist10k.npz"
IMAGES, BATCH, EPOCHS, REMOVALS, QUERIES = 1000, 32, 4, 150, 24
OPTIMIZERS = {"SGD 0.05": (SGD, 0.05), "SGD 0.2": (SGD, 0.2), "AdamW 5e-4": (AdamW, 5e-4)}

Images = tuple[Tensor, Tensor]
"""Images `[B, 784]` in [0, 1] and digits `[B]`."""


@dataclass(frozen=True)
class Digits:
    """The run's data.

    Args:
        images: that are trained on.
        order: the ids of every step.
        queries: images that are not.
    """

    images: Images
    order: Sequence[Sequence[int]]
    queries: Sequence[Images]

    def batch(self, ids: Sequence[int]) -> Images:
        """These images."""
        rows = torch.tensor(ids)
        return self.images[0][rows], self.images[1][rows]


def digits(seed: int = 0, dtype: torch.dtype = torch.float64, queries: int = QUERIES) -> Digits:
    """1,000 images shuffled anew in each of 4 epochs, batches of 32 (the last of an epoch is smaller)."""
    stored = np.load(DATA)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(stored["x"]), generator=generator)[: IMAGES + queries]
    x = torch.from_numpy(stored["x"]).flatten(1)[chosen].to(dtype) / 255
    y = torch.from_numpy(stored["y"]).long()[chosen]
    order = []
    for _ in range(EPOCHS):
        shuffled = torch.randperm(IMAGES, generator=generator)
        order += [ids.tolist() for ids in shuffled.split(BATCH)]
    held_out = [(x[i : i + 1], y[i : i + 1]) for i in range(IMAGES, IMAGES + queries)]
    return Digits((x[:IMAGES], y[:IMAGES]), order, held_out)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """784-48-10, tanh: 38,170 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 48), nn.Tanh(), nn.Linear(48, 10)).to(dtype)


def loss_fn(model: nn.Module, batch: Images) -> Tensor:
    """Mean cross-entropy, in nats."""
    return F.cross_entropy(model(batch[0]), batch[1])


def terms(model: nn.Module, batch: Images) -> Tensor:
    """`[B]`: each sample's term of that mean."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[1])


def build(name: str, model: nn.Module) -> Optimizer:
    """One of OPTIMIZERS."""
    kind, lr = OPTIMIZERS[name]
    return kind(model.parameters(), lr=lr)


def training(name: str, data: Digits, seed: int = 0) -> Training:
    """The run, to be repeated."""
    model = network(seed, data.images[0].dtype)
    return Training(model, build(name, model), [[data.batch(ids)] for ids in data.order], terms)


def removals(data: Digits, count: int = REMOVALS, seed: int = 1) -> list[Removal]:
    """One sample's term out of one step, each drawn at random over the whole run."""
    places = [(t, row) for t, ids in enumerate(data.order) for row in range(len(ids))]
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]
    return [[places[i]] for i in chosen.tolist()]


def truth(name: str, data: Digits, removed: Sequence[Removal], seed: int = 0) -> Tensor:
    """`[queries, removals]`: by how much each removal raises each query's loss."""
    return leave_out(training(name, data, seed), removed, data.queries, loss_fn)
