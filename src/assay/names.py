"""What to say of a name that is not there: the nearest one, and all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from assay.errors import InputError

__all__ = ["did_you_mean", "listed", "unknown"]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question that names the nearest of the known; empty where none is near.

    Example:
        >>> did_you_mean("cod", ["code", "law"])
        "did you mean 'code'?"
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def unknown(what: str, name: object, known: Iterable[str], hint: str) -> InputError:
    """One line for a name that is not there.

    Args:
        what: the name is of, such as "target".
        name: what was asked for.
        known: what there is.
        hint: what to do where there is nothing.
    """
    known = list(known)
    if not known:
        return InputError(f"no {what} {name!r}: this run has none; {hint}")
    guess = did_you_mean(name, known)
    return InputError(f"no {what} {name!r}: {guess}{' ' if guess else ''}known are {listed(known)}")


def listed(names: Iterable[str]) -> str:
    """Names in quotes, one after the other."""
    return ", ".join(repr(name) for name in names)
