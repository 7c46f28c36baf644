"""The parameters that are watched: their names, their groups, and what a fallback measures of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_leaves

from assay.capture.factors import Factors, Lookup
from assay.capture.marks import Weight, leaf
from assay.capture.outside import Outside

__all__ = ["Weights", "constants_of"]


def constants_of(model: Module) -> list[Tensor]:
    """The tensors of a model that carry no sample: its buffers, and what its modules hold as plain attributes."""
    modules = list(model.modules())
    classes = dict.fromkeys(kind for module in modules for kind in type(module).__mro__)
    owners: list[Module | type] = [*modules, *classes]
    held = [x for owner in owners for x in tree_leaves(list(_attributes(owner)))]
    return [*model.buffers(), *(x for x in held if isinstance(x, Tensor) and not x.requires_grad)]


_KEPT_BY_TORCH = frozenset(vars(Module()))  # parameters, buffers, submodules, hooks


def _attributes(owner: Module | type) -> Iterator[object]:
    for name, value in vars(owner).items():  # as they are stored: no property runs
        told = name not in _KEPT_BY_TORCH and not name.startswith("__")
        if told and isinstance(value, (Tensor, list, tuple, dict)):
            yield value


class Weights:
    """The parameters whose per-sample gradients are wanted, each with its name and its group.

    A group is a set of parameters whose scores may be added before the optimizer's scale is known (the optimizer's
    parameter groups).

    Args:
        named: name and parameter.
        groups: group index of each parameter.
        constants: further tensors of the model that carry no sample (buffers).
        stand_ins: what the forward pass uses in the place of a parameter, where that is another tensor (the gathered
            form of a shard).
        lookups: tied parameters of which only a part of the uses counts where factors are streamed: True for those that
            look rows up, False for all others.

    Attributes:
        uncovered: parameters that the fallback measures, and why.
        fallback: which one, "forward mode" or "sample loop".
        outside: what was made of tensors from outside of the steps.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Parameter]],
        groups: Mapping[Parameter, int],
        constants: Iterable[Tensor] = (),
        stand_ins: Mapping[Parameter, Tensor] | None = None,
        lookups: Mapping[Parameter, bool] | None = None,
    ) -> None:
        self.names = {param: name for name, param in named}
        self.groups = {param: groups[param] for param in self.names}
        self.stand_ins = stand_ins or {}
        self.lookups = lookups or {}
        self.marks = {id(self.used(param)): leaf(param, self.groups[param]) for param in self.names}
        self.constants = {id(tensor): tensor for tensor in constants}  # held, so that no id is given anew
        self.uncovered: dict[Parameter, str] = {}
        self.fallback, self.outside = "", Outside()
        self.number_of_groups = max(self.groups.values(), default=0) + 1

    def hand_over(self, params: Mapping[Parameter, str], fallback: str) -> None:
        """Leave these parameters, each with the reason, to the fallback at the model's boundary."""
        self.uncovered, self.fallback = dict(params), fallback
        for param in params:
            self.marks.pop(id(self.used(param)), None)

    def used(self, param: Parameter) -> Tensor:
        """What the forward pass uses of a parameter: autograd's leaf."""
        return self.stand_ins.get(param, param)

    def counts(self, weight: Weight, factors: Factors) -> bool:
        """Whether a use is one of those that count."""
        wanted = {self.lookups[p] for p in weight.params if p in self.lookups}
        return not wanted or isinstance(factors, Lookup) in wanted

    def hooked(self) -> str:
        """What an error says where hooks on parameters may be why their gradients are no sum over the samples."""
        names = [name for param, name in self.names.items() if self.used(param)._backward_hooks]
        if not names:
            return ""
        return (
            f" A hook on {', '.join(names)} (register_hook) may change the gradient, to which no samples add up: "
            "remove it (a mask on the weight in the forward pass freezes rows as well)."
        )

    @property
    def params(self) -> list[Parameter]:
        """The parameters, in order."""
        return list(self.names)
