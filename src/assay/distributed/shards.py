"""Torch's own side of `fully_shard` (FSDP2): the one file that reads what torch does not promise to keep.

A module under `fully_shard` holds `DTensor` shards of its parameters. Its forward pass gathers each parameter into a
plain tensor, always the same object, whose memory is given back in between; the backward pass leaves gradients on
that tensor, reduces them to the mean over the processes and cuts them into shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Module, Parameter

from assay.distributed.kinds import is_sharded
from assay.errors import InputError

__all__ = ["ShardGroup", "groups_of"]


class ShardGroup:
    """Parameters that are gathered together: one call of `fully_shard`.

    Args:
        inner: torch's own object.

    Attributes:
        whole: parameter → the plain tensor that the forward pass uses in its place.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        inner.lazy_init()
        with self.gathered():
            self.whole: dict[Parameter, Tensor] = {
                p.sharded_param: p.unsharded_param for p in inner.fsdp_params
            }

    @property
    def mesh(self) -> DeviceMesh:
        """The processes that share it."""
        mesh: DeviceMesh = self.inner.mesh_info.mesh
        return mesh

    @property
    def divisor(self) -> float:
        """What the sum of the gradients over the processes is divided by."""
        return float(self.inner.gradient_divide_factor or self.mesh.size())

    @property
    def reduces(self) -> bool:
        """Whether a backward pass reduces the gradients (`set_requires_gradient_sync`)."""
        return bool(self.inner.reduce_grads and self.inner.all_reduce_grads)

    def unreduced(self) -> list[Tensor]:
        """Gradients that wait for a backward pass that reduces."""
        found = [p.unsharded_accumulated_grad for p in self.inner.fsdp_params] + [
            p.grad for p in self.whole.values()
        ]
        return [g for g in found if g is not None]

    def release(self) -> None:
        """Give the memory of the whole parameters back, so that the next pass gathers them anew."""
        self.inner.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The whole parameters are there inside (collective)."""
        self.inner.unshard()
        self.inner.wait_for_unshard()
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def reducing(self, flag: bool) -> Iterator[None]:
        """Backward passes inside reduce the gradients, or leave them unreduced."""
        names = ("reduce_grads", "all_reduce_grads", "reshard_after_backward")
        before = [getattr(self.inner, name) for name in names]
        for name, value in zip(names, (flag, flag, True), strict=True):
            setattr(self.inner, name, value)
        try:
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(self.inner, name, value)


def groups_of(root: Module) -> list[ShardGroup]:
    """All groups of a model, which torch now takes as finally wrapped.

    Raises:
        InputError: parameters that are cut by more than `fully_shard`, or not by it.
    """
    root._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    seen: dict[int, Any] = {}
    for module in root.modules():
        if is_sharded(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            several = getattr(state, "_fsdp_param_groups", None)  # before torch 2.12 there was one
            for inner in [state._fsdp_param_group] if several is None else several:
                if inner is not None:
                    seen[id(inner)] = inner
    names = {param: name for name, param in root.named_parameters()}
    for inner in seen.values():
        for p in inner.fsdp_params:
            _check(names.get(p.sharded_param, "?"), p)
    outside = set(names) - {p.sharded_param for inner in seen.values() for p in inner.fsdp_params}
    if outside:
        some = ", ".join(sorted(names[p] for p in outside)[:5])
        raise InputError(
            f"Run(model): fully_shard does not hold {some}; apply it to the whole model last: fully_shard(model)."
        )
    return [ShardGroup(inner) for inner in seen.values()]


def _check(name: str, param: Any) -> None:
    sharded = param.sharded_param
    if param.is_dtensor:
        raise InputError(
            f"Run(model): parameter {name} is cut by tensor parallelism too, in which no process sees whole "
            "per-sample gradients; train with fully_shard or DistributedDataParallel alone."
        )
    if not all(type(place) is Shard or place.is_replicate() for place in sharded.placements):
        raise InputError(
            f"Run(model): parameter {name} is laid out as {sharded.placements}; shard it in one dimension."
        )
    if hasattr(sharded.to_local(), "fsdp_pre_all_gather"):
        raise InputError(
            f"Run(model): parameter {name} is gathered in a format of its own (float8, quantised); train it in "
            "a plain format."
        )


def gather(part: Tensor, param: Parameter) -> Tensor:
    """`[targets, *shape]` whole from `[targets, *local shape]`, the parts that the processes hold (collective)."""
    assert isinstance(param, DTensor)
    places = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in param.placements]
    shape = torch.Size([part.shape[0], *param.shape])
    stride = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(
        part.contiguous(), param.device_mesh, places, run_check=False, shape=shape, stride=stride
    )
    return spread.full_tensor()


def cut(whole: Tensor, param: Parameter) -> Tensor:
    """This process's part of a tensor of the parameter's whole shape."""
    assert isinstance(param, DTensor)
    for dim, place in enumerate(param.placements):
        if isinstance(place, Shard):
            parts = list(whole.chunk(param.device_mesh.size(dim), place.dim))
            rank = param.device_mesh.get_local_rank(dim)
            whole = parts[rank] if rank < len(parts) else whole.narrow(place.dim, 0, 0)
    return whole
