"""What becomes of an error of assay's own: it is raised, or attribution ends there and the training goes on."""

from __future__ import annotations

import logging
import warnings

from assay.errors import AssayWarning, InputError

__all__ = ["Faults"]


class Faults:
    """The errors of one run.

    Args:
        on_error: "raise", or "detach": the first error is warned of and logged, and nothing more is measured.

    Attributes:
        first: the error that ended the attribution; None while there is none.
        where: in which part of the work it happened.

    Raises:
        InputError: another word.

    Example:
        >>> faults = Faults("raise")
        >>> faults.detaches, faults.first
        (False, None)
    """

    def __init__(self, on_error: str = "raise") -> None:
        if on_error not in ("raise", "detach"):
            raise InputError(f"Run(on_error={on_error!r}) is not known; choose 'raise' or 'detach'.")
        self.detaches = on_error == "detach"
        self.first: Exception | None = None
        self.where = ""

    def caught(self, where: str) -> _Caught:
        """Work of assay's own inside; it ends where it fails."""
        return _Caught(self, where)

    def note(self, where: str, error: Exception) -> None:
        """Keep an error, and tell of it if it is the first; raise it where errors are raised."""
        if not self.detaches:
            raise error
        logging.getLogger("assay").error("an error %s", where, exc_info=error)
        if self.first is not None:
            return
        self.first, self.where = error, where
        warnings.warn(
            f"attribution stopped {where} ({self.reason}); training goes on without it, and the ledger keeps what was "
            "booked before. Pass on_error='raise' to stop there instead.",
            AssayWarning,
            stacklevel=3,
        )

    @property
    def reason(self) -> str:
        """The first error in one line."""
        text = str(self.first).strip().split("\n")[0]
        return f"{type(self.first).__name__}: {text}" if text else type(self.first).__name__


class _Caught:
    """A context manager that costs next to nothing: one is entered with every torch function of a step."""

    __slots__ = ("faults", "where")

    def __init__(self, faults: Faults, where: str) -> None:
        self.faults, self.where = faults, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> bool:
        if not isinstance(error, Exception) or not self.faults.detaches:
            return False
        self.faults.note(self.where, error)
        return True
