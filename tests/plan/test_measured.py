"""The formulas beside what small runs really do: operations counted by torch, bytes by the file system."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import assay
from assay import plan
from assay.capture import contraction
from assay.demo.gpt import GPT, GPTConfig
from assay.store import RunWriter

LAYERS, WIDTH, CONTEXT, BATCH = 2, 96, 64, 8
RUN = plan.Training(tokens=CONTEXT * BATCH, context=CONTEXT, batch=BATCH, width=4)


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocabulary=512, context=CONTEXT, layers=LAYERS, heads=4, width=WIDTH))


def loss_fn(model: Module, batch: object) -> Tensor:
    assert isinstance(batch, Tensor)
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def rows(n: int = BATCH) -> Tensor:
    return torch.randint(512, (n, CONTEXT), generator=torch.Generator().manual_seed(1))


SHAPE = plan.shape_of(model(), (LAYERS, WIDTH))


def counted(work: Callable[[], object]) -> int:
    """Operations of matrix products; the kernel of attention that torch counts is the plain one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def plain_step(network: GPT) -> None:
    loss_fn(network, rows()).backward()


def steady_step(path: str, targets: int, validation: int) -> int:
    """Operations of the third step of a run, when every end of the step before is known."""
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    held_out = {str(k): assay.Target([rows(validation)], loss_fn) for k in range(targets)}

    def step() -> None:
        with run.step(list(range(BATCH))):
            plain_step(network)
        optimizer.step()
        optimizer.zero_grad()

    method = assay.InRunShapley(held_out, path=path)
    with assay.Run(network, optimizer, methods=[method], check="off") as run:
        return [counted(step) for _ in range(3)][-1]


def test_the_parameters_are_counted() -> None:
    assert SHAPE.parameters == sum(p.numel() for p in model().parameters())
    assert {name: round(shape.parameters / 1e6) for name, shape in plan.KNOWN.items()} == {
        "GPT2-small": 124,
        "Pythia-410M": 405,
        "Llama-3-8B": 8030,
        "Llama-3-70B": 70554,
    }  # as the models' own pages say


def test_a_plain_step() -> None:
    network = model()
    assert counted(lambda: plain_step(network)) == pytest.approx(
        plan.training(SHAPE, RUN).operations, rel=0.01
    )


@pytest.mark.parametrize("whole", [True, False], ids=["kept whole", "kept as pairs"])
@pytest.mark.parametrize(("targets", "validation"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("path", ["left", "trapezoid", "simpson", "hessian"])
def test_an_in_run_step(
    path: str, targets: int, validation: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        none = contraction.CostModel(kept_bytes=0)
        monkeypatch.setattr(contraction, "cost_model", lambda device: none)
        monkeypatch.setattr("assay.plan.cost.cost_model", lambda device: none)
    planned = plan.in_run(SHAPE, RUN, targets, validation, path, rides=False).operations
    network = model()
    added = steady_step(path, targets, validation) - counted(lambda: plain_step(network))
    assert added == pytest.approx(planned, rel=0.08)


def test_the_bytes_of_a_ledger(tmp_path: Path) -> None:
    samples, targets = 200_000, 3
    writer = RunWriter(tmp_path / "run", targets=[str(k) for k in range(targets)])
    generator = np.random.default_rng(0)
    ids = generator.permutation(samples)
    for step in range(samples // 1000):
        writer.add_values(
            step, 0, ids[1000 * step : 1000 * step + 1000], generator.normal(size=(1000, targets))
        )
    writer.close()
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.parquet"))
    planned = plan.in_run(SHAPE, plan.Training(samples * CONTEXT, CONTEXT, 1000), targets).disk
    assert size == pytest.approx(planned, rel=0.25)


@pytest.mark.parametrize("rank", [4, 16])
def test_an_index(rank: int, tmp_path: Path) -> None:
    batches = [(list(range(BATCH * n, BATCH * n + BATCH)), rows()) for n in range(40)]
    network = model()
    layers = [name for name, p in network.named_parameters() if p.dim() == 2 and "position" not in name]

    def build() -> None:
        assay.Index.build(
            network, batches, loss_fn, out=tmp_path / "i", projection=assay.Projection(rank=rank), check="off",
            layers=sorted({name.rpartition(".")[0] for name in layers}), exclude=["*.bias"], shard=64,
        )  # fmt: skip

    operations = counted(build)
    tokens = len(batches) * BATCH * CONTEXT
    planned = plan.index(SHAPE, tokens, CONTEXT, rank)
    assert operations == pytest.approx(planned.operations, rel=0.15)
    size = sum(path.stat().st_size for path in (tmp_path / "i").rglob("*") if path.is_file())
    assert size == pytest.approx(planned.disk, rel=0.25)


def replayed(targets: int, folder: Path | None = None) -> tuple[Callable[[], object], plan.Training]:
    """An adjoint to be taken, of enough steps that its first step's comparisons are little of it; its training."""
    network, steps = model(), 12
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    with assay.Run(network, optimizer, folder, methods=[], snapshots="auto", check="off") as run:
        for _ in range(steps):
            with run.step(list(range(BATCH))):
                plain_step(network)
            optimizer.step()
            optimizer.zero_grad()

    def go() -> None:
        queries = [rows(1) for _ in range(targets)]
        run.ledger.adjoint(network, optimizer, lambda step: [(list(range(BATCH)), rows())], loss_fn, queries)

    return go, plan.Training(steps * RUN.tokens, CONTEXT, BATCH, width=4, micro=BATCH)


def test_an_adjoint(tmp_path: Path) -> None:
    targets = 3
    go, whole = replayed(targets, tmp_path / "run")
    kinds = {"activities": [ProfilerActivity.CPU], "with_flops": True, "profile_memory": True}
    with sdpa_kernel(SDPBackend.MATH), profile(**kinds) as seen:  # type: ignore[arg-type]
        go()  # a counter of torch's own would stand between the pass and the capture, which then sees the kernels
    planned = plan.adjoint(SHAPE, whole, targets)
    products = {"aten::mm", "aten::bmm", "aten::addmm"}
    found = sum(event.flops() for event in recorded(seen) if event.name() in products)
    assert found == pytest.approx(planned.operations, rel=0.15)
    assert largest_sum(seen) == pytest.approx(planned.memory, rel=0.2)
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "snapshots").iterdir())
    assert size == pytest.approx(planned.disk, rel=0.2)


def recorded(seen: profile) -> Any:
    """What the profiler noted, as it stands: torch takes ten seconds to make a tree of it."""
    return seen.profiler.kineto_results.events()  # type: ignore[union-attr]


def largest_sum(seen: profile) -> int:
    """Bytes that torch had allocated at most since the profile began."""
    events = [e for e in recorded(seen) if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
