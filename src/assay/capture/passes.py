"""One forward pass of the model, with what it takes to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from assay.capture.layout import Layout
from assay.capture.outside import Outside

__all__ = ["Pass", "differentiable", "recorded", "surroundings"]


@dataclass
class Pass:
    """One forward pass of the model: what is needed to take it again, and what came back for its outputs.

    Args:
        args: positional arguments of the forward pass, detached, in memory of their own.
        kwargs: keyword arguments likewise.
        random: state of the random numbers before it.
        cuda_random: the same of the model's GPU, if it is on one.
        autocast: device type, whether on, dtype.
        buffers: as they were before it.
        modes: `training` of every module, in order.
        drew_numbers: whether it drew random numbers.
        places: of the outputs with a gradient, among all leaves of the output.
        layouts: of these outputs.
        sums: of their entries, to tell whether a repetition was one.
        gradients: ∂L/∂out, by output.
    """

    args: Any
    kwargs: Any
    random: Tensor
    cuda_random: list[Tensor]
    autocast: tuple[str, bool, torch.dtype]
    buffers: dict[str, Tensor]
    modes: list[bool]
    drew_numbers: bool = False
    places: list[int] = field(default_factory=list)
    layouts: list[Layout | None] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def came_back(self, output: int, gradient: Tensor) -> None:
        """Add to what is known of ∂L/∂out."""
        known = self.gradients.get(output)
        self.gradients[output] = gradient.detach().clone() if known is None else known + gradient

    def is_repeated_by(self, found: Mapping[int, Tensor]) -> bool:
        """Whether outputs, by number, are those of this pass, up to rounding."""
        apart = [
            (x.detach().double().sum() - self.sums[k]).abs()
            > 1e-2 * (self.sums[k].abs() + x.detach().double().norm())
            for k, x in found.items()
        ]
        return not bool(torch.stack(apart).any()) if apart else True


def recorded(model: Module, device: torch.device, args: Any, kwargs: Any, outside: Outside) -> Pass:
    """A pass that is about to begin."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    autocast = device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    args, kwargs = tree_map(partial(_own, outside=outside), (args, dict(kwargs)))
    modes = [module.training for module in model.modules()]
    return Pass(args, kwargs, torch.get_rng_state(), cuda, autocast, buffers, modes)


@contextmanager
def surroundings(model: Module, record: Pass, device: torch.device) -> Iterator[None]:
    """The random numbers, modes and autocast of a pass inside; what comes after is as it was."""
    kind, enabled, dtype = record.autocast
    cuda = [device] if record.cuda_random else []
    modules = list(model.modules())
    now = [module.training for module in modules]
    with torch.random.fork_rng(devices=cuda):
        torch.set_rng_state(record.random)
        if cuda:
            torch.cuda.set_rng_state(record.cuda_random[0], device)
        try:
            for module, mode in zip(modules, record.modes, strict=True):
                module.training = mode
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                yield
        finally:
            for module, mode in zip(modules, now, strict=True):
                module.training = mode


def _own(x: Any, outside: Outside) -> Any:
    """Detached, in memory of its own; what is known of a tensor from outside holds of its copy."""
    if not isinstance(x, Tensor):
        return x
    copy = x.detach().clone()
    if outside.is_constant(x):
        outside.keep_constant(copy)
    return copy


def differentiable(leaves: Sequence[Any]) -> list[int]:
    """The places of the tensors with a gradient."""
    return [
        k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad
    ]
