"""The straight line along which one step moved the weights, and the weights put on it for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Parameter

from assay.distributed import local

__all__ = ["Line", "placed"]


class Line:
    """`w(s) = w_t + s (w_{t+1} − w_t)`: begins at the present weights, ends where `end` is called.

    It holds one copy of the weights, and a second one from `end` on; of a sharded weight, this process's part.

    Args:
        params: every parameter that the step moves.

    Example:
        >>> import torch
        >>> w = Parameter(torch.tensor([1.0]))
        >>> line = Line([w])
        >>> _ = w.data.fill_(3.0)
        >>> line.end()
        >>> with line.at(0.5):
        ...     print(w.item())
        2.0
        >>> w.item()
        3.0
    """

    def __init__(self, params: Sequence[Parameter]) -> None:
        self.start = {p: local(p.detach()).clone() for p in params}
        self.stop: dict[Parameter, Tensor] = {}

    def end(self) -> None:
        """The step was taken: the line ends at the present weights."""
        self.stop = {p: local(p.detach()).clone() for p in self.start}

    def moved(self) -> dict[Parameter, Tensor]:
        """`w_t − w_{t+1}`, the downward step."""
        return {p: start - self.stop[p] for p, start in self.start.items()}

    @contextmanager
    def at(self, s: float) -> Iterator[None]:
        """The weights at w(s) inside, bit for bit what they were afterwards."""
        there = self.start if s == 0 else {p: a.lerp(self.stop[p], s) for p, a in self.start.items()}
        with placed(there, back=self.stop):
            yield


@contextmanager
def placed(
    weights: Mapping[Parameter, Tensor], back: Mapping[Parameter, Tensor] | None = None
) -> Iterator[None]:
    """Parameters with other values inside, bit for bit what they were (or what `back` holds) afterwards.

    Written into their own memory, so that views and compiled code see it; autograd's version counters stay, because
    nothing that it saved will be read with other contents.
    """
    before = {p: local(p.detach()).clone() for p in weights} if back is None else back
    try:
        for p, value in weights.items():
            local(p.data).copy_(value)
        yield
    finally:
        for p, value in before.items():
            local(p.data).copy_(value)
