"""Options that a callback takes for the run and for the method that it brings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from assay.errors import InputError
from assay.methods import InRunShapley
from assay.methods.base import Method

__all__ = ["further_methods", "of_shapley"]

OF_SHAPLEY = frozenset(inspect.signature(InRunShapley).parameters) - {"targets"}


def of_shapley(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `InRunShapley`, and the others, which are the run's.

    Example:
        >>> of_shapley({"granularity": "token", "strict": True})
        ({'granularity': 'token'}, {'strict': True})
    """
    own = {name: value for name, value in options.items() if name in OF_SHAPLEY}
    return own, {name: value for name, value in options.items() if name not in OF_SHAPLEY}


def further_methods(methods: Sequence[Method]) -> tuple[Method, ...]:
    """The methods that run beside the callback's own.

    Raises:
        InputError: one of them is what the callback brings.
    """
    if any(isinstance(method, InRunShapley) for method in methods):
        raise InputError(
            "AssayCallback(methods=[InRunShapley(...)]): the callback brings one itself; give the callback its targets "
            "and options, such as granularity='token'."
        )
    return tuple(methods)
