"""Which adjoint belongs to an optimizer."""

from __future__ import annotations

from torch.optim import SGD, Adam, AdamW, Optimizer

from assay.errors import UnsupportedOptimizerError
from assay.optimizers import unwrapped
from assay.replay.optimizers.adam import AdamAdjoint, AdamWAdjoint, AMSGradAdjoint, AMSGradWAdjoint
from assay.replay.optimizers.base import OptimizerAdjoint
from assay.replay.optimizers.sgd import SGDAdjoint

__all__ = ["adjoint_of"]

_ADJOINTS: dict[tuple[type[Optimizer], bool], type[OptimizerAdjoint]] = {
    (SGD, False): SGDAdjoint,
    (Adam, False): AdamAdjoint,
    (Adam, True): AMSGradAdjoint,
    (AdamW, False): AdamWAdjoint,
    (AdamW, True): AMSGradWAdjoint,
}


def adjoint_of(optimizer: Optimizer) -> OptimizerAdjoint:
    """The adjoint of an optimizer's step.

    Args:
        optimizer: SGD, Adam or AdamW of `torch.optim`, with all their options, also inside accelerate's and Lightning's
            wrapper.

    Raises:
        UnsupportedOptimizerError: another, or groups of which some have `amsgrad` and others do not.

    Example:
        >>> import torch
        >>> adjoint_of(SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)).buffers
        ('momentum_buffer',)
    """
    optimizer = unwrapped(optimizer)
    variants = {bool(group.get("amsgrad")) for group in optimizer.param_groups}
    kinds: list[type[Optimizer]] = [base for base in type(optimizer).__mro__ if (base, False) in _ADJOINTS]
    kind = kinds[0] if kinds else None
    if kind is None or len(variants) != 1 or type(optimizer).step is not kind.step:
        raise UnsupportedOptimizerError(
            f"the adjoint of {type(optimizer).__name__} is not known: it can replay torch.optim.SGD, Adam and AdamW, "
            "with amsgrad in all groups or in none"
        )
    return _ADJOINTS[kind, variants.pop()]()
