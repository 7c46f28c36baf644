"""Real images, and a perceptron that learns them: what values of examples are tried on."""

from __future__ import annotations

import gzip
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

DIGITS = Path(__file__).parents[3] / "shared" / "data" / "mnist10k.npz"
FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist

Images = tuple[Tensor, Tensor]
"""Images `[B, 784]` in [0, 1] and classes `[B]`."""


@cache
def load(name: str) -> Images:
    """10,000 images of MNIST or Fashion-MNIST (its test set).

    Raises:
        FileNotFoundError: the data is not there; what to install is said.
    """
    if name == "MNIST":
        found = np.load(DIGITS)
        return torch.from_numpy(found["x"]).flatten(1).float() / 255, torch.from_numpy(found["y"]).long()
    if not FASHION.is_dir():
        raise FileNotFoundError(f"{FASHION} is not there: apt-get install dataset-fashion-mnist")
    x, y = (
        np.frombuffer(gzip.decompress((FASHION / f"t10k-{name}-ubyte.gz").read_bytes()), np.uint8)
        for name in ("images-idx3", "labels-idx1")
    )
    return torch.from_numpy(x[16:].reshape(-1, 784)).float() / 255, torch.from_numpy(y[8:].copy()).long()


def network(width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """784-width-10, tanh."""
    return nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, 10)).to(dtype)


def losses(model: nn.Module, rows: Images) -> Tensor:
    """`[B]` cross-entropy, in nats."""
    return F.cross_entropy(model(rows[0]), rows[1], reduction="none")


def correct(model: nn.Module, rows: Images) -> Tensor:
    """`[B]`: 1 where the class is the likeliest."""
    return (model(rows[0]).argmax(1) == rows[1]).to(rows[0].dtype)


def features(model: nn.Module, rows: Images) -> Tensor:
    """`[B, width]`: the hidden layer."""
    assert isinstance(model, nn.Sequential)
    hidden: Tensor = model[:-1](rows[0])
    return hidden


def _sgd(rate: float, params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(params, lr=rate)


def sgd(rate: float) -> partial[Optimizer]:
    """Plain gradient descent, as something that other processes can be given."""
    return partial(_sgd, rate)
