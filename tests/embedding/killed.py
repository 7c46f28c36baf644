"""A recording that does not end, for test_kills.py to kill: `python killed.py FOLDER` prints a line for every step."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional as F

import assay


def main(out: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = assay.DataValueEmbedding(assay.Projection(rank=3), dtype="fp32", shard=7)
    run = assay.Run(model, opt, out=out, methods=[method])
    for t in range(100_000):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(t))
        with run.step(range(4 * t, 4 * t + 4)):
            F.cross_entropy(model(x), torch.arange(4) % 3).backward()
        opt.step()
        opt.zero_grad()
        print(t, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
