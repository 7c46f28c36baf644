"""What a run must know of the processes that train together; here, the answers where there is only one.

Every process calls the same methods in the same order: those marked *collective* wait for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from assay.capture import contract
from assay.capture.factors import Factors
from assay.capture.marks import Directions, Weight
from assay.distributed.kinds import is_distributed
from assay.targets import Precision, Target, TargetPass

__all__ = ["OneProcess", "local"]

Result = TypeVar("Result")


class OneProcess:
    """A model that one process trains; several of them have a subclass.

    Args:
        module: the model, without any wrapper: its parameters have the names that they had before wrapping.

    Attributes:
        kind: what the ledger says of it.
        rank: of this process.
        size: how many processes train together.
        sharded: whether a process holds a part of each parameter only.
        precision: of the training's forward passes.
    """

    kind = "one process"
    rank = 0
    size = 1
    sharded = False

    def __init__(self, module: Module) -> None:
        self.module = module
        self.precision = Precision()

    # --- the model ---

    def stand_ins(self) -> Mapping[Parameter, Tensor]:
        """What the forward pass uses in the place of a parameter, where that is another tensor."""
        return {}

    def accumulated(self, params: Iterable[Parameter]) -> list[Tensor]:
        """The memory in which the gradients of the open step add up."""
        return [local(p.grad) for p in params if p.grad is not None]

    @contextmanager
    def watching(self, carry_over: Callable[[Any, Any], None]) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch.

        Args:
            carry_over: called with what a wrapper was given and what it made of it, tensor by tensor the same.
        """
        yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around passes that are no part of the training: they reduce nothing."""
        yield

    def target_pass(self, targets: Mapping[str, Target], params: Sequence[Parameter]) -> TargetPass:
        """Losses and gradients of the targets, the work divided among the processes where that is possible."""
        return TargetPass(self.module, targets, params, self.precision)

    # --- the gradient ---

    def reduced(self) -> bool:
        """Whether the last backward pass reduced the gradients over the processes."""
        return True

    @property
    def share(self) -> float:
        """What a sample's gradient is multiplied by when the gradients are reduced."""
        return 1.0

    def contract(self, kept: list[tuple[Weight, Factors]], directions: Directions, like: Tensor) -> Tensor:
        """`capture.contract` with directions as this process holds them (collective)."""
        return contract(kept, directions, like)

    def held(self, x: Tensor) -> Tensor:
        """What this process holds of a parameter or its gradient."""
        return local(x)

    def part(self, whole: Tensor, param: Parameter) -> Tensor:
        """What this process holds of a tensor of the parameter's whole shape."""
        return whole

    @property
    def hint(self) -> str:
        """What may be wrong where the samples do not add up to the gradient."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return (
                " Several processes run here, and the model is not wrapped: where they reduce gradients, pass the "
                "DistributedDataParallel model itself to Run."
            )
        return ""

    # --- numbers ---

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes (collective)."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """Inner products of whole tensors from those of the parts that each process holds (collective)."""
        return x

    def all(self, flag: bool) -> bool:
        """Whether it holds in every process (collective)."""
        return flag

    def agreed(self, x: int) -> int:
        """The number that the first process has (collective)."""
        return x

    def together(self, work: Callable[[], Result]) -> Result:
        """Do something that may fail; where it fails in one process, all raise (collective)."""
        return work()

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """`together`, the first process before the others (collective)."""
        return work()


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a `DTensor`, any other tensor itself.

    Example:
        >>> import torch
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return x.to_local() if is_distributed(x) else x  # type: ignore[attr-defined]
