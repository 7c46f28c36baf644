"""Which parameters of a model a run watches, by name."""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Iterable, Mapping

from torch.nn import Parameter

from assay.capture import Coverage, Weights, constants_of
from assay.distributed import OneProcess
from assay.errors import InputError
from assay.names import did_you_mean
from assay.optimizers import OptimizerModel

__all__ = ["fingerprint", "watched"]


def fingerprint(weights: Weights) -> dict[str, int | str]:
    """What tells a model's watched parameters from another's: how many, their entries, their names and shapes."""
    named = sorted((name, tuple(p.shape)) for p, name in weights.names.items())
    return {
        "parameters": len(named),
        "entries": sum(math.prod(shape) for _, shape in named),
        "crc32": f"{zlib.crc32(repr(named).encode()):08x}",
    }


def watched(
    processes: OneProcess, optimizer: OptimizerModel, exclude: Iterable[str]
) -> tuple[Weights, Coverage]:
    """The parameters to watch, and what is left out with the reason.

    Args:
        processes: that train together, with the model.
        optimizer: the model of the optimizer that owns the parameters.
        exclude: names of parameters to leave out, or patterns.

    Raises:
        InputError: the optimizer owns other parameters, a name is unknown, or nothing is left.
    """
    model = processes.module
    named = dict(model.named_parameters())  # a shared parameter appears once, under its first name
    owned = set(optimizer.params())
    _check_ownership(named, owned)
    patterns = list(exclude)
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            guess = did_you_mean(pattern, named)
            raise InputError(
                f"Run(exclude=[{pattern!r}]): the model has no such parameter{'; ' if guess else ''}{guess}"
            )
    left_out: dict[str, tuple[int, str]] = {}
    found: list[tuple[str, Parameter]] = []
    for name, param in named.items():
        reason = (
            "excluded"
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            else "frozen"
            if not param.requires_grad
            else "not optimized"
            if param not in owned
            else None
        )
        if reason is None:
            found.append((name, param))
        else:
            left_out[name] = (param.numel(), reason)
    if not found:
        raise InputError(
            "Run(model, optimizer): no trainable parameter is left to watch; "
            "leave one out of exclude=, or set requires_grad."
        )
    groups = {param: optimizer.group_index(param) for _, param in found}
    weights = Weights(found, groups, constants_of(model), processes.stand_ins())
    return weights, Coverage(weights.names, left_out)


def _check_ownership(named: Mapping[str, Parameter], owned: set[Parameter]) -> None:
    params = set(named.values())
    foreign = owned - params
    if foreign:
        raise InputError(
            f"Run(model, optimizer): {len(foreign)} of the optimizer's {len(owned)} parameters are not in the model; "
            "pass the module that holds them all (before wrapping), and the optimizer that was made from it."
        )
