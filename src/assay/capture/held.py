"""Directions held in less memory than they take where they are read: written out one parameter at a time.

A target's gradient is one more copy of the weights. A `Held` one stands wherever `Directions` do: what asks for a
parameter gets its direction written out, on the parameter's device, and lets go of it when it was contracted.

    Low       in bfloat16
    OnHost    in host memory
    Factored  as pairs of factors (`factored`)
    Sum, Scaled, Joined    what the methods make of them, formed when it is read
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture.marks import Directions
from assay.capture.pairs import Pair

__all__ = [
    "Held",
    "Joined",
    "Low",
    "Scaled",
    "Sum",
    "joined",
    "number_of",
    "scaled",
    "total",
]

Gain = Callable[[Parameter], "Tensor | float | None"]


class Held(Mapping[Parameter, Tensor]):
    """`{parameter: [targets, *shape]}`, each written out when it is asked for.

    Attributes:
        targets: their number.
    """

    targets: int

    @abstractmethod
    def __getitem__(self, param: Parameter) -> Tensor:
        """`[targets, *shape]`, for the caller to read."""

    def pairs(self, param: Parameter) -> Sequence[Sequence[Pair]] | None:
        """By target, what the direction is the product of; None where that is not known."""
        return None

    def stored(self, param: Parameter) -> Tensor:
        """The same entries as those of `[param]`, in as little memory as they are held."""
        return self[param]

    @abstractmethod
    def bytes(self) -> int:
        """Memory on the parameters' devices."""


class Low(Held):
    """In bfloat16 where autograd gave more: half the memory of float32, 8 binary digits.

    Args:
        gradient: `{parameter: [targets, *shape]}`, which is emptied on the way.

    Example:
        >>> w = Parameter(torch.zeros(2))
        >>> low = Low({w: torch.tensor([[1.0, 1 / 3]])})
        >>> low[w], low.bytes()
        (tensor([[1.0000, 0.3340]]), 4)
    """

    def __init__(self, gradient: dict[Parameter, Tensor]) -> None:
        self.targets = number_of(gradient)
        self._held: dict[Parameter, tuple[Tensor, torch.dtype]] = {}
        for p in list(gradient):
            g = gradient.pop(p)
            self._held[p] = g.to(torch.bfloat16) if g.dtype.itemsize > 2 else g, g.dtype

    def __getitem__(self, param: Parameter) -> Tensor:
        held, dtype = self._held[param]
        return held.to(dtype)

    def stored(self, param: Parameter) -> Tensor:
        """In bfloat16: what contracts it widens it."""
        return self._held[param][0]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def bytes(self) -> int:
        """Half of what they take in float32."""
        return sum(held.nbytes for held, _ in self._held.values())


class Sum(Held):
    """`Σ_k c_k G_k`: no sum is held.

    Args:
        parts: of the same parameters; multiples and directions.
    """

    def __init__(self, parts: Sequence[tuple[float, Directions]]) -> None:
        self.parts: list[tuple[float, Directions]] = []
        for factor, part in parts:
            inner = part.parts if isinstance(part, Sum) else [(1.0, part)]
            self.parts += [(factor * own, directions) for own, directions in inner]
        self.targets = number_of(self.parts[0][1])

    def __getitem__(self, param: Parameter) -> Tensor:
        return _added([(factor, part[param]) for factor, part in self.parts])

    def pairs(self, param: Parameter) -> Sequence[Sequence[Pair]] | None:
        """Those of all parts, where all have them."""
        found: list[list[Pair]] = [[] for _ in range(self.targets)]
        for factor, part in self.parts:
            pairs = part.pairs(param) if isinstance(part, Held) else None
            if pairs is None:
                return None
            for own, more in zip(found, pairs, strict=True):
                own += [pair.times(factor) for pair in more]
        return found

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parts[0][1])

    def __len__(self) -> int:
        return len(self.parts[0][1])

    def bytes(self) -> int:
        """Those of the parts."""
        return sum(_bytes(part) for _, part in self.parts)


class Scaled(Held):
    """`K ⊙ G`, K read when G is; zero where there is none.

    Args:
        directions: G.
        gain: K of a parameter, a number for a multiple of the identity; None for zero.
        params: the parameters; all by default.
        diagonal: K is known to be no number, so that there is no need to form it in order to see.
    """

    def __init__(
        self,
        directions: Held,
        gain: Gain,
        params: Collection[Parameter] | None = None,
        diagonal: bool = False,
    ) -> None:
        self._directions, self._gain, self.targets = directions, gain, directions.targets
        self._params, self._diagonal = list(directions if params is None else params), diagonal

    def __getitem__(self, param: Parameter) -> Tensor:
        gain = self._gain(param)
        if gain is None:
            return torch.zeros(self.targets, *param.shape, dtype=param.dtype, device=param.device)
        return multiplied(self._directions[param], gain)

    def pairs(self, param: Parameter) -> Sequence[Sequence[Pair]] | None:
        """Those of G, if K is a number: a diagonal leaves no low rank."""
        pairs = None if self._diagonal else self._directions.pairs(param)
        gain = self._gain(param) if pairs is not None else None
        if pairs is None or not isinstance(gain, (int, float)):
            return None
        return [[pair.times(gain) for pair in own] for own in pairs]

    def stored(self, param: Parameter) -> Tensor:
        """That of G, where K is 1."""
        gain = None if self._diagonal else self._gain(param)
        one = isinstance(gain, (int, float)) and gain == 1
        return self._directions.stored(param) if one else self[param]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def bytes(self) -> int:
        """Those of G."""
        return self._directions.bytes()


class Joined(Held):
    """The targets of several behind one another.

    Args:
        parts: of the same parameters.
    """

    def __init__(self, parts: Sequence[Held]) -> None:
        self.parts: list[Held] = []
        for part in parts:
            self.parts += part.parts if isinstance(part, Joined) else [part]
        self.targets = sum(part.targets for part in self.parts)

    def __getitem__(self, param: Parameter) -> Tensor:
        return torch.cat([part[param] for part in self.parts])

    def pairs(self, param: Parameter) -> Sequence[Sequence[Pair]] | None:
        """Those of all parts, where all have them."""
        found = [part.pairs(param) for part in self.parts]
        return None if any(x is None for x in found) else [own for x in found if x for own in x]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parts[0])

    def __len__(self) -> int:
        return len(self.parts[0])

    def bytes(self) -> int:
        """Those of the parts."""
        return sum(part.bytes() for part in self.parts)


def number_of(directions: Directions) -> int:
    """Targets of some directions, none of which is written out for it."""
    return directions.targets if isinstance(directions, Held) else next(iter(directions.values())).shape[0]


def joined(parts: Sequence[Directions]) -> Directions:
    """`{parameter: [all targets, *shape]}`."""
    if len(parts) == 1:
        return parts[0]
    held = [part for part in parts if isinstance(part, Held)]
    if held:
        return Joined(held)
    return {p: torch.cat([part[p] for part in parts]) for p in parts[0]}


def total(parts: Sequence[tuple[float, Directions]], over: float = 1) -> Directions:
    """`Σ_k c_k G_k / over`: formed now where all are tensors, and when it is read where one is held otherwise.

    Example:
        >>> w = Parameter(torch.zeros(1))
        >>> total([(0.5, {w: torch.tensor([[2.0]])}), (2.0, {w: torch.tensor([[3.0]])})])[w]
        tensor([[7.]])
    """
    if any(isinstance(part, Held) for _, part in parts):
        return Sum([(factor / over, part) for factor, part in parts])
    made = {p: _added([(factor, part[p]) for factor, part in parts]) for p in parts[0][1]}
    return made if over == 1 else {p: g / over for p, g in made.items()}


def scaled(
    directions: Directions,
    gain: Gain,
    params: Collection[Parameter] | None = None,
    diagonal: bool = False,
) -> Directions:
    """`K ⊙ G`: formed now from tensors, and when it is read from what is held otherwise; see `Scaled`."""
    if isinstance(directions, Held):
        return Scaled(directions, gain, params, diagonal)
    made: dict[Parameter, Tensor] = {}
    for p in directions if params is None else params:
        own = gain(p)
        made[p] = torch.zeros_like(directions[p]) if own is None else multiplied(directions[p], own)
    return made


def multiplied(direction: Tensor, gain: Tensor | float) -> Tensor:
    """`[targets, *shape]`: K ⊙ G."""
    return direction if isinstance(gain, float) and gain == 1.0 else direction * gain


def _added(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    (factor, first), *others = parts
    found = first if factor == 1 else factor * first
    for factor, part in others:
        found = torch.add(found, part, alpha=factor)
    return found


def _bytes(directions: Directions) -> int:
    return directions.bytes() if isinstance(directions, Held) else sum(x.nbytes for x in directions.values())
