"""Why a compiled part cannot be followed as such."""

from __future__ import annotations

__all__ = ["CannotCompileError"]


class CannotCompileError(Exception):
    """Nothing has run yet, and the eager capture can take over; the message is the reason, as part of a sentence."""
