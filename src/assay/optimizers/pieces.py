"""A coming step in pieces: large parameters cut, so that what is between stays in the cache, small ones joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch.nn import Parameter

from assay.optimizers.inputs import Inputs, joined
from assay.optimizers.model import OptimizerModel, Parts

__all__ = ["Piece", "pieces"]

SMALL = 1 << 14  # entries up to which a parameter's arithmetic takes no longer than its calls


@dataclass(frozen=True)
class Piece:
    """Entries whose step is read at once.

    Attributes:
        where: The flattened parameters' entries, in order.
        parts: Of their step.
    """

    where: Sequence[tuple[Parameter, slice]]
    parts: Parts


@torch.no_grad()
def pieces(optimizer: OptimizerModel, params: Sequence[Parameter], entries: int) -> Iterator[Piece]:
    """Yield the coming step of parameters piece by piece, entry by entry the same as :meth:`OptimizerModel.split`.

    Args:
        optimizer: Its model, which must be ``elementwise``.
        params: Parameters of it that have a ``.grad``.
        entries: Of one piece at most.

    Raises:
        InputError: A parameter is in no group.
        CoverageError: A gradient is sparse or complex.
    """
    together: dict[Any, list[tuple[Parameter, Inputs]]] = {}
    filled: dict[Any, int] = {}  # entries that wait in each
    for param in params:
        inputs = optimizer.inputs(param)
        kind = inputs.kind() if param.numel() <= min(SMALL, entries) else None
        if kind is not None:
            waiting = together.setdefault(kind, [])
            filled[kind] = filled.get(kind, 0) + param.numel()
            if filled[kind] > entries:
                yield _join(optimizer, waiting)
                waiting.clear()
                filled[kind] = param.numel()
            waiting.append((param, inputs.flat()))
            continue
        flat = inputs.flat()
        for start in range(0, param.numel(), entries):
            part = slice(start, min(start + entries, param.numel()))
            yield Piece([(param, part)], optimizer.parts(flat.at(itemgetter(part))))
    for waiting in together.values():
        yield _join(optimizer, waiting)


def _join(optimizer: OptimizerModel, members: Sequence[tuple[Parameter, Inputs]]) -> Piece:
    inputs = [found for _, found in members]
    return Piece(
        [(param, slice(0, param.numel())) for param, _ in members],
        optimizer.parts(joined(inputs) if len(inputs) > 1 else inputs[0]),
    )
