"""Which shards of a store are whose, where several processes write it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from assay.errors import InputError

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """Every `parts`-th shard, from shard `part` on.

    Args:
        part: which writer, from 0.
        parts: how many there are.

    Raises:
        InputError: there is no such part.

    Example:
        >>> list(Share(1, 2).own(0, 10, shard=3))  # shards are rows 0–2, 3–5, 6–8, 9–11
        [(1, 3, 6), (3, 9, 10)]
    """

    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise InputError(
                f"part {self.part} of {self.parts}: parts are counted from 0; give 0 to {self.parts - 1}."
            )

    def own(self, start: int, stop: int, shard: int) -> Iterator[tuple[int, int, int]]:
        """`(shard, start, stop)` of the rows from start to stop that lie in own shards."""
        for number in range(start // shard, -(-stop // shard)):
            if number % self.parts == self.part:
                yield number, max(start, number * shard), min(stop, (number + 1) * shard)

    def shard(self, own: int) -> int:
        """The number of the own-th shard of this writer."""
        return own * self.parts + self.part

    def rows(self, total: int, shard: int) -> int:
        """How many of `total` rows are this writer's."""
        return sum(stop - start for _, start, stop in self.own(0, total, shard))

    @property
    def manifest(self) -> str:
        """The file in which this writer commits."""
        return "manifest.json" if self.parts == 1 else f"manifest-{self.part:05d}-of-{self.parts:05d}.json"
