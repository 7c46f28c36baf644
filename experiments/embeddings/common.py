"""What the experiments on data value embeddings share: how a run is recorded and compared, and how a result is kept."""

from __future__ import annotations

from torch import Tensor


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last dimension, ties in the order of their places."""
    return x.argsort(-1).argsort(-1).double()


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation over the last dimension, the mean over all others."""
    x, y = ranks(a.double()), ranks(b.double())
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())
