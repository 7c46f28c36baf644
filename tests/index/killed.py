"""Build a small index for test_kills.py to kill.

`python killed.py FOLDER KIND` prints a line for every batch; `python killed.py FOLDER KIND serve` builds part P of N in
a process of its own for every line "P N" that it reads, and prints that process's number, then how it ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import StoreError
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


def settings(kind: str, examples: Any = None, talk: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a build."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    projection = Projection(rank=3, kind=kind)  # type: ignore[arg-type]

    def say(n: int) -> None:
        if talk:
            print(n, flush=True)

    examples = Examples() if examples is None else examples
    options = {"projection": projection, "dtype": "int8", "shard": 7, "progress": say}
    return (model, examples, loss_fn), options


def build(out: Path, kind: str, examples: Any = None, talk: bool = False) -> Index:
    arguments, options = settings(kind, examples, talk)
    return Index.build(*arguments, out=out, **options)


def build_part(out: Path, kind: str, part: int, parts: int, examples: Any = None) -> None:
    arguments, options = settings(kind, examples)
    Index.build_part(*arguments, part, parts, out=out, **options)


def serve(out: Path, kind: str) -> None:
    """Nothing here may use a thread before the fork."""
    for line in sys.stdin:
        part, parts = map(int, line.split())
        child = os.fork()
        if not child:
            try:
                if parts == 1:
                    build(out, kind, Examples(40))
                else:
                    build_part(out, kind, part, parts, Examples(40))
            except StoreError as error:
                # The kill before fell between the last write and the end of its process: nothing is left to do.
                os._exit(0 if "already holds an index" in str(error) else 1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3:] == ["serve"]:
        serve(Path(sys.argv[1]), sys.argv[2])
    else:
        build(Path(sys.argv[1]), sys.argv[2], Examples(12), talk=True)
