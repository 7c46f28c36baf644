"""Algorithm 2, influence checkpointing: the run in segments, each gone through backward by itself, from the disk.

What is in memory at a time: one operator per block of coordinates and one piece of the segment's rows.

    segment-00000/rows        local embeddings, the segment's last row first
    segment-00000/operator-…  derivatives of the state at the segment's end by that at its beginning, one per block
    segment-00000/done.json   of which plan; written when the segment is whole, so that a killed build goes on after it
    built.json                which rows belong to which segment; written last
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from assay.embedding.header import SCALARS
from assay.embedding.recorded import Recorded
from assay.embedding.recursion import Operator, Rows, Update
from assay.errors import InputError
from assay.methods.embedding import Curvature
from assay.rows import Folder, RowDtype, RowWriter
from assay.workers import Workers

__all__ = ["Blocks", "Plan", "Segment", "build", "plan_of"]

Blocks = Literal["layer", "all"]
WIDEST = 16384  # coordinates of a block: its operator is a matrix of that many rows and columns


@dataclass(frozen=True)
class Segment:
    """Steps `first` to `last − 1` of the recording, and their rows `start` to `stop − 1`."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """How embeddings are built.

    Args:
        curvature: of the training loss.
        blocks: "layer" or "all".
        momentum: whether the momentum buffer is part of the state.
        segments: in the order of time.
        columns: `(start, stop)` of each block.
    """

    curvature: Curvature
    blocks: Blocks
    momentum: bool
    segments: tuple[Segment, ...]
    columns: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """Of the folder that holds the result."""
        state = "momentum" if self.momentum else "weights"
        return f"built-{self.curvature}-{self.blocks}-{state}-{len(self.segments)}"

    def looked_at(self, segment: int) -> int:
        """Numbers per coordinate of a local embedding: at the very end, the weights only."""
        return 2 if self.momentum and segment < len(self.segments) - 1 else 1

    def write(self, folder: Folder) -> None:
        """Say that all segments are there."""
        folder.write_json("built.json", asdict(self))

    def is_built(self, folder: Folder) -> bool:
        """Whether the folder holds just this."""
        found = folder.read_json("built.json")
        return found is not None and found == _plain(asdict(self))


def plan_of(recorded: Recorded, segments: int, curvature: Curvature, blocks: Blocks, momentum: bool) -> Plan:
    """Cut a recording into segments of about equal numbers of rows.

    Raises:
        InputError: an argument that is not understood, or a curvature that was not recorded.
    """
    steps = recorded.steps
    if curvature not in ("fisher", "ggn"):
        raise InputError(f"embeddings(curvature={curvature!r}) is not known; choose 'fisher' or 'ggn'.")
    if curvature == "ggn" and not recorded.header.draws:
        raise InputError(
            "embeddings(curvature='ggn'): the run recorded no Gauss-Newton rows; train with "
            "DataValueEmbedding(curvature='ggn'), or use curvature='fisher'."
        )
    if blocks not in ("layer", "all"):
        raise InputError(f"embeddings(blocks={blocks!r}) is not known; choose 'layer' or 'all'.")
    if not isinstance(segments, int) or not 1 <= segments <= len(steps):
        raise InputError(
            f"embeddings(segments={segments!r}) must be a whole number from 1 to the number of steps, {len(steps)}."
        )
    layers = recorded.header.layers
    columns = [(x.start, x.stop) for x in layers] if blocks == "layer" else [(0, recorded.header.width)]
    for (start, stop), layer in zip(columns, layers, strict=False):
        if stop - start > WIDEST:
            what = f"layer {layer.name!r}" if blocks == "layer" else "the block over all layers"
            raise InputError(
                f"embeddings(blocks={blocks!r}): {what} has {stop - start} coordinates, too many for one operator; "
                "record with a smaller rank" + ("" if blocks == "layer" else ", or use blocks='layer'") + "."
            )
    carried = any(bool((s.scalars[:, SCALARS.index("carry")] != 0).any()) for s in steps)
    return Plan(curvature, blocks, momentum and carried, tuple(_cut(recorded, segments)), tuple(columns))


def _cut(recorded: Recorded, segments: int) -> Iterator[Segment]:
    steps, first = recorded.steps, 0
    for k in range(segments):
        goal = recorded.length * (k + 1) / segments
        most = len(steps) - (segments - 1 - k)  # every later segment needs a step
        last = first + 1
        while last < most and (k == segments - 1 or steps[last].stop <= goal):
            last += 1
        yield Segment(first, last, steps[first].start, steps[last - 1].stop)
        first = last


def build(recorded: Recorded, folder: Folder, plan: Plan, workers: Workers) -> None:
    """Go through every segment that is not there yet.

    Args:
        recorded: the gradients.
        folder: for the result.
        plan: how.
        workers: who go through the segments; in memory it is this process.

    Raises:
        InputError: embeddings that are not finite.
        StoreError: the disk refuses.
    """
    if plan.is_built(folder):
        return
    numbers = range(len(plan.segments))
    if folder.place == "memory" or folder.place.startswith("memory/"):
        for k in numbers:
            _segment(recorded, folder, plan, k)
    else:
        for _ in workers.run(_apart, ((recorded.folder.place, plan, k) for k in numbers)):
            pass
    plan.write(folder)


def _apart(place: str, plan: Plan, number: int) -> None:
    """One segment, in whatever process."""
    recorded = Recorded(Folder(place))
    _segment(recorded, recorded.folder.below(plan.name), plan, number)


@torch.no_grad()
def _segment(recorded: Recorded, folder: Folder, plan: Plan, number: int) -> None:
    """Algorithm 1 within a segment, from the identity at its end."""
    segment, inner = plan.segments[number], folder.below(f"segment-{number:05d}")
    done = asdict(segment)
    if inner.read_json("done.json") == done:
        return
    for name in ("done.json", "rows/manifest.json"):  # first what says that there is something
        inner.delete(name)
    for name in inner.names():  # what an earlier build with other rows, or a killed one, has left
        inner.delete(name)
    whole = plan.looked_at(number) == 2
    operators = [
        Operator(stop - start, recorded.dtype, momentum=plan.momentum, whole=whole)
        for start, stop in plan.columns
    ]
    width = sum(len(operator.A) for operator in operators)
    dtype: RowDtype = "fp64" if recorded.dtype == torch.float64 else "fp32"
    writer = RowWriter(inner.below("rows"), width, dtype)
    for first, last in reversed(recorded.windows(segment.first, segment.last)):
        found = _window(recorded, plan, operators, first, last)
        rows = range(recorded.steps[last - 1].stop - 1, recorded.steps[first].start - 1, -1)
        writer.append(pl.DataFrame({"id": pl.Series(list(rows), dtype=pl.Int64)}), found.flip(0))
    writer.close()
    for n, operator in enumerate(operators):
        inner.write_array(f"operator-{n:05d}", operator.whole.numpy())
    inner.write_json("done.json", done)


def _window(recorded: Recorded, plan: Plan, operators: Sequence[Operator], first: int, last: int) -> Tensor:
    """`[rows, looked at]`: the embeddings of some steps, gone through backward."""
    begin = recorded.steps[first].start
    rows = recorded.read(begin, recorded.steps[last - 1].stop)  # [rows, parts, width]
    entries = recorded.header.entries()
    weights = recorded.weights.to(rows.dtype)
    found = []
    for step in reversed(recorded.steps[first:last]):
        own = rows[step.start - begin : step.stop - begin]
        a = weights[step.start : step.stop]
        parts = []
        for (start, stop), operator in zip(plan.columns, operators, strict=True):
            update = Update.of(step.scalars, entries[start:stop], rows.dtype)
            block = Rows.of(own[:, :, start:stop], a, recorded.header.preconditioned)
            parts.append(operator.back(block, update, plan.curvature))
        E = torch.cat(parts, 1)
        if not bool(torch.isfinite(E).all()):
            raise InputError(
                f"the embeddings of step {step.number} are not finite: at this learning rate the product of I − K H "
                "grows without bound; use curvature='ggn', or more segments and at_step= of a nearer checkpoint."
            )
        found.append(E)
    return torch.cat(found[::-1])


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
