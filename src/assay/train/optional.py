"""Libraries that only some users need, imported at the moment of use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from assay.errors import InputError

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: dotted name of the module.
        extra: the extra of this package that installs it.

    Raises:
        InputError: the library is not installed; the message says how to install it.

    Example:
        >>> require("json", "train").dumps([1])
        '[1]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the library is there, and something that it needs itself is not
        raise InputError(f"{error.name} is not installed: pip install 'assay[{extra}]'") from error
