"""Work that is killed at any moment and begun again: a training run, an index, a pass of embeddings.

Each function does its work in a folder from wherever it stands there, and notes in `acknowledged` what it was told
is safe: for a run, the last checkpoint's step, written after a flush.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.embedding.resume import recorded_steps
from assay.rows.folder import Folder
from assay.store.files import write_atomic

STEPS, EVERY, BATCH = 24, 3, 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 5, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def loss_fn(model: nn.Module, batch: object) -> Tensor:
    x, y = batch  # type: ignore[misc]
    return F.cross_entropy(model(x), y)


def record(folder: Path) -> None:
    """Train with recorded gradients and snapshots, and a checkpoint every few steps, from the last checkpoint on."""
    train(folder, [assay.DataValueEmbedding(assay.Projection(rank=2), shard=10)], snapshots="auto")


def run(folder: Path) -> None:
    """Train with in-run values and a checkpoint every few steps, from the last checkpoint on."""
    train(folder, [assay.InRunShapley(assay.Target([batch(999)], loss_fn), path="trapezoid")])


def train(folder: Path, methods: list[Any], snapshots: str | None = None) -> None:
    """From the last checkpoint to the last step."""
    random.seed(0)  # nothing draws from these, but the snapshots' log says how they stand
    np.random.seed(0)
    checkpoint, model = folder / "checkpoint.pt", net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["done"]
    with assay.Run(
        model, optimizer, out=folder / "run", methods=methods, resume=start, check="off", snapshots=snapshots
    ) as watched:
        for step in range(start, STEPS):
            with watched.step([f"{step}-{i}" for i in range(BATCH)]):
                loss_fn(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % EVERY == 0:
                watched.state_dict()
                torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1},
                    folder / "new.pt",
                )
                os.replace(folder / "new.pt", checkpoint)
                write_atomic(folder / "acknowledged", str(step + 1).encode())


def index(folder: Path) -> None:
    """Log 60 examples in commits of 7."""
    examples = [(list(range(BATCH * n, BATCH * n + BATCH)), batch(n)) for n in range(15)]
    if not (folder / "index" / "curvature" / "curvature.json").exists():
        assay.Index.build(
            net(), examples, loss_fn, out=folder / "index", projection=assay.Projection(rank=2), shard=7
        )


def embedding(folder: Path) -> None:
    """Go through a finished run backwards, in five segments."""
    assay.open(folder / "run").embeddings(segments=5)


def answers(kind: str, folder: Path) -> dict[str, str]:
    """Checksums of what a user reads at the end; the same for broken and unbroken work."""
    return {name: f"{zlib.crc32(repr(found).encode()):08x}" for name, found in _answers(kind, folder)}


def _answers(kind: str, folder: Path) -> Iterator[tuple[str, object]]:
    if kind == "index":
        yield from ((str(p.relative_to(folder)), p.read_bytes()) for p in files(folder))
        return
    ledger = assay.open(folder / "run")
    if kind == "embedding":
        yield "embeddings", ledger.embeddings(segments=5).export().numpy().tobytes()
    elif kind == "record":
        for path in files(folder / "run" / "embeddings"):
            yield str(path.relative_to(folder)), path.read_bytes()
        for path in files(folder / "run" / "snapshots"):
            if path.suffix == ".pt":
                yield path.name[:-12], contents(path)
    else:
        yield "steps", ledger.steps().rows()
        yield "account", ledger.account().rows()


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def contents(path: Path) -> list[object]:
    """Of a file of tensors: what it holds, whichever way its pickle is put together."""
    leaves = torch.utils._pytree.tree_leaves(torch.load(path))
    return [x.numpy().tobytes() if isinstance(x, Tensor) else x for x in leaves]


def committed(kind: str, folder: Path) -> int:
    """How much a reader finds now: steps of a run, rows of an index, whole."""
    if kind == "run":
        return len(assay.open(folder / "run").account()) if (folder / "run" / "run.json").exists() else 0
    if kind == "record":
        return len(recorded_steps(Folder(folder / "run" / "embeddings")))
    manifest = Folder(folder / "index" / "rows").read_json("manifest.json")
    return 0 if manifest is None else int(manifest["rows"])


VICTIMS = {"run": run, "index": index, "embedding": embedding, "record": record}
