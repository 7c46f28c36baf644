"""What torch's sharding left on a module or a tensor, without importing it: that takes longer than all of assay."""

from __future__ import annotations

import sys

from torch import Tensor
from torch.nn import Module

__all__ = ["is_distributed", "is_sharded"]


def is_sharded(module: Module) -> bool:
    """Whether `fully_shard` was applied to a module."""
    return hasattr(module, "_get_fsdp_state")


def is_distributed(x: Tensor) -> bool:
    """Whether a tensor is a `DTensor`: nobody has one who has not imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
