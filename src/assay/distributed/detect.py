"""Which kind of distributed training a model is under."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn import Module
from torch.nn.parallel import DataParallel, DistributedDataParallel

from assay.distributed.kinds import is_distributed, is_sharded
from assay.distributed.processes import OneProcess
from assay.distributed.replicated import Replicated
from assay.errors import InputError

__all__ = ["parallel_of"]


def parallel_of(model: Module) -> OneProcess:
    """How the processes of a run share its model.

    Args:
        model: as the training loop calls it: plain, in `DistributedDataParallel`, or under `fully_shard`.

    Raises:
        InputError: a kind of parallel training in which per-sample gradients cannot be followed.

    Example:
        >>> import torch
        >>> parallel_of(torch.nn.Linear(2, 1)).kind
        'one process'
    """
    if not isinstance(model, Module):
        raise InputError(
            f"Run(model): a torch.nn.Module is needed, not {type(model).__name__}: pass the model itself."
        )
    _refuse_wrappers(model)
    if isinstance(model, DistributedDataParallel):
        return Replicated(model)
    if not dist.is_available():
        return OneProcess(model)
    if is_sharded(model):
        from assay.distributed.sharded import Sharded

        return Sharded(model)
    if any(is_distributed(p) for p in model.parameters()):
        inside = any(is_sharded(module) for module in model.modules())
        raise InputError(
            "Run(model): fully_shard was applied to parts of the model only; apply it to the model itself last."
            if inside
            else "Run(model): its parameters are DTensors (tensor parallelism), in which no process sees whole "
            "per-sample gradients; train with fully_shard or DistributedDataParallel."
        )
    return OneProcess(model)


def _refuse_wrappers(model: Module) -> None:
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, DataParallel):
            raise InputError(
                "Run(model): torch.nn.DataParallel splits a batch unseen; use DistributedDataParallel."
            )
        if kind.__name__ == "FullyShardedDataParallel":
            raise InputError(
                "Run(model): FullyShardedDataParallel (FSDP1) flattens the parameters, so that per-sample gradients "
                "cannot be followed; use torch.distributed.fsdp.fully_shard (FSDP2) instead."
            )
        if kind.__name__ == "DeepSpeedEngine":
            raise InputError(
                "Run(model): DeepSpeed's engine steps by itself; use fully_shard (FSDP2) instead."
            )
        if isinstance(module, DistributedDataParallel) and module is not model:
            raise InputError(
                f"Run(model): the part {name!r} alone is in DistributedDataParallel; pass the wrapped model itself "
                "(compile before wrapping), or wrap the whole."
            )
