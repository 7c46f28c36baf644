"""A target's gradient as the pairs of factors that its backward pass leaves, where those are smaller than it is.

The validation batches are one "sample" to the capture: of every use of a weight the pair (activations, output
gradients) comes out, and torch is not asked for that weight's gradient at all. What is used in any other way is taken
from autograd as always.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from assay.capture import pairs
from assay.capture.coverage import Coverage
from assay.capture.factors import Factors, Lookup, Outer
from assay.capture.held import Held
from assay.capture.marks import Weight
from assay.capture.mode import Capture
from assay.capture.pairs import Pair
from assay.capture.products import sides
from assay.capture.weights import Weights
from assay.errors import AssayWarning
from assay.targets import Precision, Target, TargetPass, eagerly, refuse_constant, undisturbed

__all__ = ["Factored", "FactoredPass"]

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3}  # of ‖G‖; half precision: 0.05


class Factored(Held):
    """One target's gradient: pairs for some parameters, `[1, *shape]` for the others.

    Args:
        factors: the pairs.
        dense: the others.
    """

    targets = 1

    def __init__(
        self, factors: Mapping[Parameter, Sequence[Pair]], dense: Mapping[Parameter, Tensor]
    ) -> None:
        self._factors, self._dense = dict(factors), dict(dense)

    def __getitem__(self, param: Parameter) -> Tensor:
        if param in self._dense:
            return self._dense[param]
        own = self._factors[param]
        if not own:  # used by nothing this time
            return torch.zeros_like(param)[None]
        return pairs.written_out(own, param.shape)[None]

    def pairs(self, param: Parameter) -> Sequence[Sequence[Pair]] | None:
        """Those of the one target."""
        return [self._factors[param]] if param in self._factors else None

    def __iter__(self) -> Iterator[Parameter]:
        yield from self._factors
        yield from self._dense

    def __len__(self) -> int:
        return len(self._factors) + len(self._dense)

    def bytes(self) -> int:
        """Each piece of memory once: layers that read the same activations share them."""
        tensors = [x for own in self._factors.values() for pair in own for x in (pair.left, pair.right)]
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(held.values()) + sum(x.nbytes for x in self._dense.values())


class FactoredPass(TargetPass):
    """Losses and gradients of all targets in one process, `Factored`.

    The first pass takes every gradient in both forms: a parameter is held in pairs from then on if they are smaller
    for every target and agree with autograd.

    Args:
        model: the model that is trained; a compiled one runs eagerly in these passes.
        targets: name → target.
        weights: the watched parameters.
        precision: of the training's forward passes.
    """

    def __init__(
        self,
        model: Module,
        targets: Mapping[str, Target],
        weights: Weights,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(model, targets, weights.params, precision)
        self._weights = weights
        self._chosen: dict[Parameter, None] | None = None

    def pieces(self) -> Iterator[tuple[Tensor, Held]]:  # type: ignore[override]
        """Target by target: `[1]` loss and gradient."""
        if self._chosen is None:
            self._choose()
        if not self._chosen:
            for loss, gradient in super().pieces():
                yield loss, Factored({}, gradient)
            return
        for name, target in self.targets.items():
            yield self._taken(name, target)

    def forget(self) -> None:
        """Choose anew which parameters are held in pairs."""
        self._chosen = None

    def _taken(self, name: str, target: Target) -> tuple[Tensor, Factored]:
        while self._chosen:
            loss, factors, dense, other = self._pass(name, target, list(self._chosen))
            if not other:
                return loss[None], Factored(factors, {p: g[None] for p, g in dense.items()})
            self._chosen = {p: None for p in self._chosen if p not in other}  # used in another way this time
        with undisturbed(self.model), torch.enable_grad():
            loss, gradient = self._gradient(name, target)
        return loss[None], Factored({}, {p: g[None] for p, g in zip(self.params, gradient, strict=True)})

    def _choose(self) -> None:
        wanted = {p: None for p in self.params if p not in self._weights.uncovered}
        for name, target in self.targets.items() if wanted else ():
            _, factors, dense, other = self._pass(name, target, list(wanted), both=True)
            for p in list(wanted):
                if p in other or not _smaller(factors[p], p) or not _agree(factors[p], dense[p]):
                    del wanted[p]
        self._chosen = wanted
        if not wanted:
            rows = "no parameter's factors take less memory than its gradient"
            warnings.warn(
                f"InRunShapley(target_gradient='factors'): {rows}, so all are held written out; give a target fewer or "
                "shorter samples, or choose target_gradient='bfloat16'.",
                AssayWarning,
                stacklevel=2,
            )

    def _pass(
        self, name: str, target: Target, chosen: list[Parameter], both: bool = False
    ) -> tuple[Tensor, dict[Parameter, list[Pair]], dict[Parameter, Tensor], set[Parameter]]:
        """Loss, pairs of the chosen parameters, gradients of the others (of all, if both), and uses without a pair."""
        factors: dict[Parameter, list[Pair]] = {p: [] for p in chosen}
        other: set[Parameter] = set()
        asked = self.params if both else [p for p in self.params if p not in factors]
        dense: dict[Parameter, Tensor] = {}
        total: Tensor | None = None

        def take(weight: Weight, found: Factors, _: slice) -> None:
            if weight.derived or len(weight.params) != 1 or not isinstance(found, (Outer, Lookup)):
                other.update(weight.params)
                return
            factors[weight.params[0]].append(_pair(found))

        with undisturbed(self.model), torch.enable_grad(), eagerly():
            for batch in target.batches:
                capture = self._capture(chosen)
                capture.takes.append(take)
                with capture.marking(), capture:
                    loss = self._loss(name, target, batch) / len(target.batches)
                    refuse_constant(name, loss)
                    _, *gradients = torch.autograd.grad(loss, [capture.probe, *asked], allow_unused=True)
                other.update(capture.refused or ())
                total = loss.detach() if total is None else total + loss.detach()
                for p, g in zip(asked, gradients, strict=True):
                    if g is not None:  # added to a new one: pairs may share memory with it
                        dense[p] = dense[p] + g if p in dense else g
        assert total is not None
        return total, factors, {p: dense[p] if p in dense else torch.zeros_like(p) for p in asked}, other

    def _capture(self, chosen: list[Parameter]) -> Capture:
        """Of one sample: all rows of the batch belong to it, wherever they go."""
        weights = self._weights
        watched = Weights(
            [(weights.names[p], p) for p in chosen], weights.groups, weights.constants.values(), weights.stand_ins
        )  # fmt: skip
        return Capture(watched, 1, strict=True, refused={}, coverage=Coverage(watched.names))


def _pair(factors: Outer | Lookup) -> Pair:
    left, right = sides(factors)
    left = left.reshape(-1) if isinstance(factors, Lookup) else left.reshape(-1, left.shape[-1])
    return Pair(_own(left), _own(right.reshape(-1, right.shape[-1])))


def _own(x: Tensor) -> Tensor:
    """Without history, and not as a piece of something larger."""
    x = x.detach()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _smaller(own: Sequence[Pair], param: Parameter) -> bool:
    return sum(pair.left.nbytes + pair.right.nbytes for pair in own) < param.nbytes


def _agree(own: Sequence[Pair], gradient: Tensor) -> bool:
    """Whether all uses were seen."""
    if not own:
        return not bool(gradient.any())
    found = pairs.written_out(own, gradient.shape)
    apart = (found - gradient.to(found.dtype)).norm()
    lowest = min((pair.right.dtype for pair in own), key=lambda dtype: -torch.finfo(dtype).eps)
    return bool(apart <= AGREEMENT.get(lowest, 0.05) * gradient.norm().to(apart) + 1e-30)
