"""What two processes cannot do: each function runs in both, and checks the one line that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.cases import Case, data, loss_fn, made, targets_of, wrapped
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor

import assay
from assay.errors import AssayError, CoverageError, InputError, StoreError

DDP, FSDP = Case("ddp"), Case("fsdp")
NAMES: list[str] = []


def refusal(check: Callable[[int, int, Path], None]) -> Callable[[int, int, Path], None]:
    NAMES.append(check.__name__)
    return check


def start(model: nn.Module, optimizer: Any = None, out: Path | None = None, **options: Any) -> assay.Run:
    method = assay.InRunShapley(targets_of(DDP), **options)
    return assay.Run(model, optimizer or SGD(model.parameters(), lr=0.1), out=out, methods=[method])


def says(error: type[Exception], *parts: str) -> Any:
    return pytest.raises(error, match=".*".join(parts))


@refusal
def fsdp1_and_data_parallel(rank: int, size: int, out: Path) -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with says(InputError, "FSDP1", "fully_shard"):
        start(FullyShardedDataParallel(made(DDP)))
    with says(InputError, "DataParallel splits", "DistributedDataParallel"):
        start(nn.DataParallel(made(DDP)))


@refusal
def factors_of_the_validation_batches(rank: int, size: int, out: Path) -> None:
    with says(InputError, "target_gradient='factors'", "2 train together", "'bfloat16' or 'cpu'"):
        start(wrapped(DDP, made(DDP)), target_gradient="factors")


@refusal
def tensor_parallelism(rank: int, size: int, out: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    with says(InputError, "tensor parallelism", "train with fully_shard or DistributedDataParallel"):
        start(model)
    grid = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    parallelize_module(model, grid["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=grid["dp"])
    with says(InputError, "0.weight", "tensor parallelism"):
        start(model)


@refusal
def parts_of_a_model(rank: int, size: int, out: Path) -> None:
    model = made(FSDP)
    fully_shard(model.inner)
    with says(InputError, "parts of the model only", "apply it to the model itself last"):
        start(model)
    model = nn.Sequential(DistributedDataParallel(nn.Linear(4, 3)))
    with says(InputError, "'0' alone is in DistributedDataParallel"):
        start(model)
    model = made(DDP)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["v"])
    with says(InputError, "does not reduce v"):
        start(DistributedDataParallel(model))


@refusal
def gradients_that_are_no_mean(rank: int, size: int, out: Path) -> None:
    model = wrapped(DDP, made(DDP))
    model.register_comm_hook(PowerSGDState(None), powerSGD_hook)
    with says(InputError, "communication hook 'powerSGD_hook'", "use none"):
        start(model)
    model = wrapped(DDP, made(DDP))
    model.mixed_precision = object()
    with says(InputError, "mixed_precision", "torch.autocast"):
        start(model)


@refusal
def settings_that_need_whole_parameters(rank: int, size: int, out: Path) -> None:
    model = wrapped(FSDP, made(FSDP))
    with says(InputError, "path='hessian'", "path='trapezoid'"):
        start(model, path="hessian")
    with says(InputError, "momentum='sketch'", "momentum='exact'"):
        start(model, SGD(model.parameters(), lr=0.1, momentum=0.9), momentum="sketch")
    with says(InputError, "Adafactor", "AdamW"):
        start(model, Adafactor(model.parameters()))


@refusal
def methods_of_one_process(rank: int, size: int, out: Path) -> None:
    model = wrapped(DDP, made(DDP))
    method = assay.DataValueEmbedding(assay.Projection(rank=2))
    with says(InputError, "DataValueEmbedding records what one process sees", "InRunShapley alone"):
        assay.Run(model, SGD(model.parameters(), lr=0.1), methods=[method])


@refusal
def a_step_without_a_reduction(rank: int, size: int, out: Path) -> None:
    model = wrapped(DDP, made(DDP))
    optimizer = SGD(model.parameters(), lr=0.1)
    run = start(model, optimizer)
    with model.no_sync(), run.step([rank, rank + 2]):
        loss_fn(model, data(2, rank)).backward()
    with says(InputError, "did not reduce the gradients", "leave no_sync()"):
        optimizer.step()


@refusal
def a_model_without_its_wrapper(rank: int, size: int, out: Path) -> None:
    model = wrapped(DDP, made(DDP))
    run = start(model.module, SGD(model.parameters(), lr=0.1))
    with (
        says(CoverageError, "do not add up to .grad", "pass the DistributedDataParallel model itself"),
        run.step([0, 1]),
    ):
        loss_fn(model, data(2, rank)).backward()
    dist.barrier()


class Unseen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return Unseen.apply(self.inner(x.double()), self.gain)


@refusal
def a_use_that_no_rule_follows_under_fully_shard(rank: int, size: int, out: Path) -> None:
    model = fully_shard(Hidden().double())
    run = start(model)
    with says(CoverageError, "gain", "under fully_shard there are none"), run.step([0, 1]):
        loss_fn(model, data(2, rank)).backward()
    dist.barrier()


@refusal
def a_use_that_only_the_fallback_follows_under_ddp(rank: int, size: int, out: Path) -> None:
    model = DistributedDataParallel(Hidden().double())
    run = start(model)
    with run.step([0, 1]):
        loss_fn(model, data(2, rank)).backward()
    assert "sample loop" in run.coverage()["status"].to_list()


@refusal
def an_error_of_one_process_is_heard_by_all(rank: int, size: int, out: Path) -> None:
    if rank == 1:
        out.write_text("a file")
    path = out.with_name("of-process-0") if rank == 0 else out
    error, text = (
        (AssayError, "process 1 of 2 stopped with StoreError") if rank == 0 else (StoreError, "cannot write")
    )
    with says(error, text):
        start(wrapped(DDP, made(DDP)), out=path)


@refusal
def an_exception_in_one_process_leaves_what_was_recorded(rank: int, size: int, out: Path) -> None:
    model = wrapped(DDP, made(DDP))
    optimizer = SGD(model.parameters(), lr=0.1)

    def train_a_while() -> None:
        with start(model, optimizer, out, path="trapezoid") as run:
            for step in range(3):
                with run.step([2 * step + rank]):
                    loss_fn(model, data(1, step + 10 * rank)).backward()
                optimizer.step()
                optimizer.zero_grad()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_a_while()
    dist.barrier()
    ledger = assay.open(out)
    assert ledger.values("target 0").height == 4  # the last step waits for a gradient that never came
    assert ledger.account("target 0")["step"].to_list() == [0, 1]
