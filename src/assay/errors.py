"""Every error that assay raises on purpose: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

__all__ = [
    "AssayError",
    "AssayWarning",
    "CoverageError",
    "InputError",
    "NewerFormatError",
    "StoreError",
    "UnreadableError",
    "UnsupportedOptimizerError",
]


class AssayError(Exception):
    """Base class of every error that assay raises on purpose."""


class InputError(AssayError, ValueError):
    """What the caller handed over cannot be used: ids, targets, a configuration."""


class CoverageError(AssayError):
    """A parameter is used in a way for which no exact score can be formed, and it was not excluded."""


class UnsupportedOptimizerError(AssayError):
    """The optimizer's update is not linear in the gradient, or assay does not know it."""


class StoreError(AssayError, OSError):
    """A run folder cannot be written or read."""


class UnreadableError(StoreError):
    """A file could not be read just now, which says nothing of what is in it."""


class NewerFormatError(StoreError):
    """A folder was written by a newer version of assay."""

    def __init__(self, place: object, version: int, known: int) -> None:
        super().__init__(
            f"{place} has format version {version}, newer than this assay's {known}: upgrade assay"
        )


class AssayWarning(UserWarning):
    """Something that does not stop the run but that a reader of its numbers should know."""
