"""Which parameters an index covers."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn import Module

from assay.capture import Weights, constants_of
from assay.errors import InputError

__all__ = ["select", "weights_named"]


def select(model: Module, layers: Iterable[str | type[Module]] | None, exclude: Iterable[str]) -> Weights:
    """The trainable parameters to watch.

    Args:
        model: the model.
        layers: names of modules or parameters (or patterns such as `"blocks.*.mlp"`), and types of modules, whose
            parameters are wanted; None wants all.
        exclude: names of parameters or patterns to leave out.

    Raises:
        InputError: a name that matches nothing, or nothing is left.
    """
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    wanted = set(named)
    if layers is not None:
        wanted = set()
        for layer in [layers] if isinstance(layers, (str, type)) else layers:
            wanted |= (
                _of_type(model, layer, named) if isinstance(layer, type) else _named(layer, named, "layers")
            )
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        wanted -= _named(pattern, named, "exclude")
    kept = [(name, param) for name, param in named.items() if name in wanted]
    if not kept:
        raise InputError("Index.build(model, ...): no trainable parameter is left to watch.")
    return Weights(kept, {param: 0 for _, param in kept}, constants_of(model))


def weights_named(model: Module, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """The parameters of an index, in another instance of its model.

    Raises:
        InputError: the model lacks one of them, or has it in another shape; it is named.
    """
    named = dict(model.named_parameters())
    for name, shape in shapes.items():
        param = named.get(name)
        if param is None or tuple(param.shape) != shape or not param.requires_grad:
            found = (
                "has none"
                if param is None
                else f"has {list(param.shape)}"
                if param.requires_grad
                else "froze it"
            )
            raise InputError(
                f"the index holds parameter {name!r} of shape {list(shape)}, and this model {found}: query with the "
                "model that was indexed."
            )
    kept = [(name, named[name]) for name in shapes]
    return Weights(kept, {param: 0 for _, param in kept}, constants_of(model))


def _of_type(model: Module, kind: type[Module], named: Mapping[str, Tensor]) -> set[str]:
    found = {
        name
        for prefix, module in model.named_modules()
        if isinstance(module, kind)
        for name in named
        if name.startswith(f"{prefix}." if prefix else "")
    }
    if not found:
        raise InputError(
            f"layers=[{kind.__name__}]: the model has no such module with trainable parameters; "
            "name a class that it has."
        )
    return found


def _named(pattern: str, named: Mapping[str, Tensor], argument: str) -> set[str]:
    found = {
        name for name in named if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"{pattern}.*")
    }
    if not found:
        near = difflib.get_close_matches(pattern, named, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"{argument}=[{pattern!r}]: the model has no such trainable parameter{hint}")
    return found
