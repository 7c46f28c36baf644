"""`DistributedDataParallel`: every process holds the whole model, and gradients are averaged in the backward pass.

With L_r the sum of process r's gradients since the last step, `.grad` is Σ_r L_r / R after a backward pass that
synchronises (Li et al., PyTorch Distributed, VLDB 2020, section 3), and L_r alone, unreduced, after one under
`no_sync()`. So a sample's part of `.grad` is g_i / R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from assay.distributed.group import Group
from assay.errors import InputError
from assay.targets import Target, TargetPass

__all__ = ["Replicated"]

MEANS = (
    "allreduce_hook",
    "fp16_compress_hook",
    "bf16_compress_hook",
)  # over the processes, of every gradient


class Replicated(Group):
    """A model in `DistributedDataParallel`.

    Args:
        wrapper: the wrapped model.

    Raises:
        InputError: a setting of the wrapper under which `.grad` is not the mean over the processes.
    """

    kind = "ddp"

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        _refuse_settings(wrapper)
        super().__init__(wrapper.module, wrapper.process_group, next(wrapper.module.parameters()).device)
        self.wrapper = wrapper
        self._reduced = True

    @contextmanager
    def watching(self, carry_over: Callable[[Any, Any], None]) -> Iterator[None]:
        """Note whether the forward pass inside announces a reduction."""
        _refuse_hooks(self.wrapper)
        self._reduced = True

        def note(*_: object) -> None:
            if torch.is_grad_enabled():
                self._reduced = bool(self.wrapper.require_backward_grad_sync)

        hook = self.wrapper.register_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def reduced(self) -> bool:
        """Not under `no_sync()`."""
        return self._reduced

    def target_pass(self, targets: Mapping[str, Target], params: Sequence[Parameter]) -> TargetPass:
        """Each process takes its part of the batches."""
        return DividedTargetPass(self, targets, params)


class DividedTargetPass(TargetPass):
    """The targets' batches dealt out to the processes, losses and gradients added up.

    A single batch in all is not divided: every process computes the same.
    """

    def __init__(self, group: Group, targets: Mapping[str, Target], params: Sequence[Parameter]) -> None:
        super().__init__(group.module, targets, params, group.precision)
        self.group = group
        places = [(name, k) for name, target in targets.items() for k in range(len(target.batches))]
        self.divided = len(places) > 1
        self._mine = set(places[group.rank :: group.size] if self.divided else places)

    def _batches(self, name: str, target: Target) -> Sequence[Any]:
        return [batch for k, batch in enumerate(target.batches) if (name, k) in self._mine]

    def losses(self) -> Tensor:
        """`[targets]`: the targets' losses, no gradients."""
        losses = super().losses()
        return self._total(losses)

    def gradients(self) -> tuple[Tensor, dict[Parameter, Tensor]]:
        """`[targets]` losses and `{parameter: [targets, *shape]}` gradients, the same in every process."""
        losses, gradients = super().gradients()
        if self.divided:
            gradients = dict(zip(gradients, self.group.total_of_all(list(gradients.values())), strict=True))
        return self._total(losses), gradients

    def pieces(self) -> Iterator[tuple[Tensor, dict[Parameter, Tensor]]]:
        """All at once: the processes compute them side by side."""
        yield self.gradients()

    def hessian_products(self, direction: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """`{parameter: [targets, *shape]}`, each process with all batches."""
        return TargetPass(self.model, self.targets, self.params, self.precision).hessian_products(direction)

    def _total(self, losses: Tensor) -> Tensor:
        wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
        return self.group.total(wide) if self.divided else wide


def _refuse_settings(wrapper: DistributedDataParallel) -> None:
    if wrapper.mixed_precision is not None:
        raise InputError(
            "Run(model): DistributedDataParallel(mixed_precision=...) computes with copies of the parameters; wrap "
            "the forward pass in torch.autocast instead."
        )
    ignored = sorted(
        name for name in wrapper.parameters_to_ignore if name in dict(wrapper.module.named_parameters())
    )
    if ignored:
        raise InputError(
            f"Run(model): DistributedDataParallel does not reduce {', '.join(ignored[:5])}, so each process trains a "
            "model of its own; let it reduce all parameters."
        )
    _refuse_hooks(wrapper)


def _refuse_hooks(wrapper: DistributedDataParallel) -> None:
    for hook, _ in wrapper._comm_hooks:
        name = getattr(hook, "__name__", type(hook).__name__)
        if name not in MEANS:
            raise InputError(
                f"Run(model): the communication hook {name!r} changes gradients by more than a mean over the "
                f"processes, so that no sample's part of them is known; use none, or one of {', '.join(MEANS)}."
            )
