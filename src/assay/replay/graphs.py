"""Gradients whose graphs stay alive from the replay of their step until its turn comes on the way back.

Without them a step takes its forward pass and the gradient of its activations twice: once in the replay, once to
differentiate them. As many graphs are kept as a budget of memory holds, from the end of a segment backwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from assay.replay.curvature import Curvature
from assay.replay.gradient import Taken
from assay.replay.trajectory import StepRecord
from assay.snapshots import bytes_of

__all__ = ["GRAPHS", "Graphs"]

GRAPHS = "2 GB"  # that are kept by default


class Graphs:
    """Chooses the steps, and keeps account of what their graphs hold.

    Args:
        curvature: that takes and uses them.
        budget: bytes, or such as "2 GB".
        first: the first step that is visited; going back through it takes no second derivative.

    Raises:
        InputError: a budget that cannot be read.
    """

    def __init__(self, curvature: Curvature, budget: int | str, first: int) -> None:
        self.curvature, self.first = curvature, first
        self.budget = bytes_of(budget, "adjoint(graphs=...)")
        self._chosen: frozenset[int] = frozenset()
        self._each = 0  # bytes of the largest step so far
        self._held = 0

    def begin(self, records: Sequence[StepRecord]) -> None:
        """A segment with these steps is about to be replayed."""
        self._held = 0
        if not self.curvature.keeps:
            self._chosen = frozenset()
            return
        largest = max((len(record.ids) for record in records), default=1)
        each = max(self._each, self.curvature.held * largest, 1)
        steps = [record.step for record in records if record.step > self.first]
        self._chosen = frozenset(steps[max(len(steps) - self.budget // each, 0) :])

    def wants(self, step: int) -> bool:
        """Whether this step's graphs are kept: it was chosen, and there is room."""
        return step in self._chosen and self._held + self._each <= self.budget

    def note(self, taken: Sequence[Taken]) -> None:
        """The graphs of one more step are held."""
        held = sum(part.held for part in taken)
        self._each = max(self._each, held)
        self._held += held
