"""Sections of `docs/results.md` on whether values are of any use, each in the shape of `experiments.evidence.shape`."""

from __future__ import annotations

from collections.abc import Callable

from experiments.tables import Result

__all__ = ["PLOTS", "SECTIONS"]

SECTIONS: dict[str, Callable[[Result], str]] = {}
PLOTS: dict[str, tuple[str, Callable[[Result], str]]] = {}
