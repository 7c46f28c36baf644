"""The totals of the first micro-batch: the per-sample gradients must add up to `.grad`, with the user's own loss.

No unseen use of a parameter survives this, whatever the model returns: Σ_i ⟨g_i, G⟩ = ⟨.grad, G⟩ for a random G.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.factors import Factors
from assay.capture.marks import Weight
from assay.capture.mode import Weights, contract
from assay.errors import CoverageError

__all__ = ["check_totals", "gradients_of"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}  # of ‖.grad‖·rms(G); half precision: 0.1


def gradients_of(weights: Weights) -> dict[Parameter, Tensor]:
    """Copies of the gradients as they stand, for those parameters that have one."""
    return {p: p.grad.clone() for p in weights.params if p.grad is not None}


@torch.no_grad()
def check_totals(
    weights: Weights, kept: list[tuple[Weight, Factors]], like: Tensor, before: Mapping[Parameter, Tensor]
) -> None:
    """Compare what was kept of a micro-batch with what its backward pass added to `.grad`.

    Args:
        weights: the watched parameters.
        kept: the per-sample gradients of all their uses.
        like: scores of the micro-batch, `[groups, any, B]`.
        before: the gradients before the micro-batch.

    Raises:
        CoverageError: names the parameters for which they differ.
    """
    added = {p: p.grad - before[p] if p in before else p.grad for p in weights.params if p.grad is not None}
    if not all(bool(torch.isfinite(g).all()) for g in added.values()):
        return  # a step that overflowed says nothing
    random = {p: _random(p) for p in weights.params}
    if _agree(contract(kept, random, like).sum(), added, random):
        return
    zero = {p: torch.zeros_like(random[p]) for p in weights.params}
    wrong = [
        name
        for p, name in weights.names.items()
        if p in added
        and not _agree(contract(kept, {**zero, p: random[p]}, like).sum(), {p: added[p]}, {p: random[p]})
    ]
    if wrong:
        raise CoverageError(
            f"the per-sample gradients of {', '.join(wrong)} do not add up to .grad: a use of it was not seen. Is it "
            "used inside a custom autograd.Function, through a copy made outside run.step, or in a term of the loss "
            f"that is no sample's? Use a plain torch operation, or pass exclude={wrong} (scores are then partial)."
        )


def _agree(seen: Tensor, added: Mapping[Parameter, Tensor], random: Mapping[Parameter, Tensor]) -> bool:
    wide = torch.promote_types(seen.dtype, torch.float32)
    truth = sum(
        ((g.to(wide) * random[p][0].to(wide)).sum() for p, g in added.items()), torch.zeros((), dtype=wide)
    )
    size = torch.stack([g.to(wide).norm() for g in added.values()]).norm() if added else torch.zeros(())
    tolerance = max((TOLERANCE.get(p.dtype, 0.1) for p in added), default=0.1)
    return bool((seen - truth).abs() <= tolerance * size + 1e-30)


def _random(param: Parameter) -> Tensor:
    """`[1, *shape]`: a random direction, from a generator of its own."""
    generator = torch.Generator(device=param.device).manual_seed(param.numel())
    return torch.randn(1, *param.shape, generator=generator, dtype=param.dtype, device=param.device)
