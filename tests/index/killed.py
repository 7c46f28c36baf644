"""Build a small index: `python killed.py FOLDER KIND`, a line for every batch, for test_kills.py to kill."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.index import Index
from assay.projection import Projection


class Examples:
    """Batches of 5, the same at every pass; shards of 7 fall across them."""

    def __init__(self, batches: int = 4) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[list[int], tuple[Tensor, Tensor]]]:
        g = torch.Generator().manual_seed(1)
        for n in range(self.batches):
            batch = torch.randn(5, 7, generator=g), torch.randint(4, (5,), generator=g)
            yield list(range(5 * n, 5 * n + 5)), batch


def loss_fn(model: nn.Module, batch: object) -> Tensor:
    x, y = batch  # type: ignore[misc]
    return F.cross_entropy(model(x), y)


def build(out: Path, kind: str, examples: Any = None, talk: bool = False) -> Index:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    projection = Projection(rank=3, kind=kind)  # type: ignore[arg-type]

    def say(n: int) -> None:
        if talk:
            print(n, flush=True)

    examples = Examples() if examples is None else examples
    return Index.build(
        model, examples, loss_fn, out=out, projection=projection, dtype="int8", shard=7, progress=say
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    build(Path(sys.argv[1]), sys.argv[2], Examples(12), talk=True)
