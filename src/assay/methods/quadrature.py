"""The integral of ∇ℓ_val along a step, from as many gradients as it takes.

    Ḡ = ∫_0^1 ∇ℓ_val(w_t + s Δ_t) ds,        v_i = Ḡᵀ K_t g_i

`trapezoid` needs the two ends, which are there anyway: the right end of a step is the left end of the next one.
`simpson` adds the middle. With a tolerance, a step whose account does not close is cut in halves again and again
(composite Simpson, whose error falls 16 times with each cut), until it closes or `max_points` is reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.held import total
from assay.capture.marks import Directions
from assay.distributed import OneProcess
from assay.methods.line import Line
from assay.methods.step import along

__all__ = ["Integral", "Quadrature"]


@dataclass(frozen=True)
class Integral:
    """The mean gradient along one step.

    Args:
        gradient: Ḡ.
        points: at how many points of the step the gradient was taken, both ends among them.
        met: whether the account closes within the tolerance; true where none was asked for.
        seconds: that the points between the ends took.
    """

    gradient: Directions
    points: int
    met: bool
    seconds: float


@dataclass(frozen=True)
class Quadrature:
    """How the integral is taken.

    Args:
        path: "trapezoid" or "simpson".
        tolerance: largest |residual| / |actual| of a step and target that is left alone; None leaves all alone.
        max_points: a step gets at most so many points; 2^k + 1 of them make sense.
    """

    path: str
    tolerance: float | None = None
    max_points: int = 17

    def integrate(
        self,
        line: Line,
        left: Directions,
        right: Directions,
        drop: Tensor,
        rounding: Tensor,
        passes: Callable[[], Directions],
        processes: OneProcess,
    ) -> Integral:
        """Integrate along one step.

        Args:
            line: the step.
            left: ∇ℓ at its beginning.
            right: ∇ℓ at its end.
            drop: `[targets]`, ℓ(w_t) − ℓ(w_{t+1}).
            rounding: `[targets]`, how well the drop is known.
            passes: takes ∇ℓ at the present weights.
            processes: that train together, and take the same points.
        """
        rule = _Composite(line, left, right, passes)
        if self.path == "simpson":
            rule.halve()
        if self.tolerance is None:
            return Integral(rule.mean, rule.points, True, rule.seconds)
        moved = line.moved()
        allowed = (self.tolerance * drop.abs()).maximum(rounding)
        explained = processes.whole(_drop_of(rule.mean, moved))
        while not (met := processes.all(bool(((drop - explained).abs() <= allowed).all()))):
            if 2 * rule.points - 1 > self.max_points:
                break
            before = explained
            rule.halve()
            explained = processes.whole(_drop_of(rule.mean, moved))
            if processes.all(bool(((explained - before).abs() <= 0.1 * allowed).all())):
                # the integral has settled: what the account still misses has another cause
                met = processes.all(bool(((drop - explained).abs() <= allowed).all()))
                break
        return Integral(rule.mean, rule.points, met, rule.seconds)


class _Composite:
    """The trapezoidal rule on one interval; composite Simpson on 2, 4, 8, … of them."""

    def __init__(
        self, line: Line, left: Directions, right: Directions, passes: Callable[[], Directions]
    ) -> None:
        self.line, self.passes = line, passes
        self.ends = total([(1.0, left), (1.0, right)])
        self.inner: Directions | None = None  # Σ of ∇ℓ over the inner points
        self.mean = total([(0.5, self.ends)])
        self.points, self.seconds = 2, 0.0

    def halve(self) -> None:
        """Cut every interval in two: one gradient at each of the new points."""
        started = time.perf_counter()
        intervals = 2 * (self.points - 1)
        odd: Directions | None = None
        for j in range(1, intervals, 2):
            with self.line.at(j / intervals):
                odd = _plus(odd, self.passes())
        assert odd is not None
        inner = [] if self.inner is None else [(2.0, self.inner)]
        self.mean = total([(1.0, self.ends), (4.0, odd), *inner], over=3 * intervals)
        self.inner = _plus(self.inner, odd)
        self.points = intervals + 1
        self.seconds += time.perf_counter() - started


def _plus(a: Directions | None, b: Directions) -> Directions:
    return b if a is None else total([(1.0, a), (1.0, b)])


def _drop_of(gradient: Directions, moved: Mapping[Parameter, Tensor]) -> Tensor:
    """`[targets]`: the drop that a mean gradient explains, ⟨Ḡ, w_t − w_{t+1}⟩."""
    parts = [along(g, moved[p]) for p, g in gradient.items() if p in moved]
    return torch.stack(parts).sum(0) if parts else torch.zeros(())
