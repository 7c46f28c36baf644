"""Which parameters an index covers."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from assay.capture import Weights, constants_of
from assay.errors import InputError

__all__ = ["select", "weights_named"]


def select(model: Module, layers: Iterable[str | type[Module]] | None, exclude: Iterable[str]) -> Weights:
    """The trainable parameters to watch.

    A weight that an embedding shares with another layer counts with all its uses under its first name. Where only that
    layer is chosen (`layers=[torch.nn.Linear]`: the head, not the table), its uses there are all that counts.

    Args:
        model: the model.
        layers: names of modules or parameters (or patterns such as `"blocks.*.mlp"`), and types of modules, whose
            parameters are wanted; None wants all.
        exclude: names of parameters or patterns to leave out.

    Raises:
        InputError: a name that matches nothing, or nothing is left.
    """
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    further = _further_names(model, named)
    wanted = set(named)
    if layers is not None:
        wanted = set()
        for layer in [layers] if isinstance(layers, (str, type)) else layers:
            every = {**named, **further}
            wanted |= (
                _of_type(model, layer, every) if isinstance(layer, type) else _named(layer, every, "layers")
            )
    there_to_exclude = {**named, **{name: param for name, param in further.items() if name in wanted}}
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        wanted -= _named(pattern, there_to_exclude, "exclude")
    kept = {param: name for name, param in named.items() if name in wanted}
    for name, param in further.items():
        if name in wanted:
            kept.setdefault(param, name)
    if not kept:
        raise InputError("Index.build(model, ...): no trainable parameter is left to watch.")
    return _weights(model, [(name, param) for param, name in kept.items()])


def _further_names(model: Module, named: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The other names of weights that an embedding shares with another kind of layer."""
    first = {param: name for name, param in named.items()}
    return {
        name: param
        for name, param in model.named_parameters(remove_duplicate=False)
        if param in first and _looks_up(model, name) != _looks_up(model, first[param])
    }


def _looks_up(model: Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Embedding)


def _weights(model: Module, kept: list[tuple[str, Parameter]]) -> Weights:
    first = {param: name for name, param in model.named_parameters()}
    lookups = {param: _looks_up(model, name) for name, param in kept if name != first[param]}
    return Weights(kept, {param: 0 for _, param in kept}, constants_of(model), lookups=lookups)


def weights_named(model: Module, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """The parameters of an index, in another instance of its model.

    Raises:
        InputError: the model lacks one of them, or has it in another shape; it is named.
    """
    named = dict(model.named_parameters())
    named |= _further_names(model, named)
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
    return _weights(model, [(name, named[name]) for name in shapes])


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
