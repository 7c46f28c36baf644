"""Inner products of per-sample weight gradients with known directions, and which way of forming them is cheaper.

For one linear layer with T positions per sample, widths d → p and n directions G `[n, p, d]`:

* *batched*: every sample's gradient `b_iᵀ a_i` by one GEMM, summed to the weight gradient and dotted with G. It
  replaces the layer's own weight-gradient GEMM; what it adds is memory traffic, `B·p·d` entries.
* *directional*: the output's change `a Gᵀ` along G, dotted with the output's gradient: one more GEMM per direction.
* *fused*: the batched form inside one kernel of a GPU, where a sample's gradient stays in the registers (`fused`).

The batched form works through a few samples at a time, so that their gradients stay in the last cache, and through
single ones where their gradients are large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from assay.capture.fused import arithmetic, available, fused
from assay.capture.layout import Layout
from assay.capture.room import Room

__all__ = [
    "SHIPPED",
    "Blocks",
    "CostModel",
    "batched",
    "cheapest",
    "cost_model",
    "directional",
    "per_sample_gradients",
    "per_sample_products",
    "weight_gradient_and_products",
]


@dataclass(frozen=True)
class CostModel:
    """Seconds per elementary piece of work, and the memory that one block of per-sample gradients may take.

    The defaults were measured on two cores of a server CPU by `benchmarks/contractions.py`; `assay bench calibrate`
    measures those of the machine that it runs on (`calibration`).
    """

    per_entry: float = 0.35e-9  # a per-sample gradient entry written, summed and dotted once
    per_flop: float = 5.8e-12  # one floating-point operation inside a GEMM
    kept_bytes: int = (
        256 << 20
    )  # per-sample gradients of one layer that may be kept where a pair would be smaller
    block_bytes: int = 10 << 20  # per-sample gradients of one block: a few samples, within the last cache
    alone_bytes: int = 1 << 19  # from this size on a sample's gradient is a block of its own
    fused_per_entry: float = 1e-12  # a per-sample gradient entry dotted with a direction inside the kernel
    fused_per_flop: float = 1e-12  # by how much an operation of the kernel is slower than one of the GEMM

    def batched(self, batch: int, p: int, d: int, targets: int) -> float:
        """Extra seconds of the batched form over the weight-gradient GEMM that it replaces."""
        return batch * p * d * self.per_entry * (1 + 0.3 * (targets - 1))

    def directional(self, batch: int, positions: int, p: int, d: int, targets: int) -> float:
        """Extra seconds of the directional form."""
        return targets * batch * positions * (2 * p * d * self.per_flop + 2 * p * self.per_entry)

    def fused(self, batch: int, positions: int, p: int, d: int, targets: int) -> float:
        """Extra seconds of the fused form over the weight-gradient GEMM that it replaces."""
        return batch * p * d * (2 * positions * self.fused_per_flop + targets * self.fused_per_entry)

    def samples_per_block(self, p: int, d: int, itemsize: int) -> int:
        """How many samples' gradients to form at once; where it is more than one, a whole number for each thread."""
        samples, threads = self.block_bytes // (p * d * itemsize), torch.get_num_threads()
        return max(1, samples - samples % threads if samples > threads else samples)

    def forms_alone(self, p: int, d: int, itemsize: int) -> bool:
        """Whether one sample's gradient after the other is summed and dotted."""
        return p * d * itemsize >= self.alone_bytes


COST = CostModel()
TOGETHER = 8  # gradients that the products of the batched form add up by themselves
# Where nothing was calibrated: on a GPU by the data sheet of an A100 (1.5 TB/s; 20 Tflop/s without tensor cores, 156
# in tf32, 312 in 16 bits, of which a product reaches 70 %), and for the kernel by the guess that it reaches three
# quarters of the library's speed on tensor cores and a third without.
CUDA = CostModel(
    per_entry=8e-12, per_flop=5e-14, kept_bytes=2 << 30, block_bytes=80 << 20, alone_bytes=80 << 20,
    fused_per_flop=1e-13,
)  # fmt: skip
SHIPPED = {
    "cpu": COST,
    "cuda": CUDA,
    "cuda tf32": replace(CUDA, per_flop=9e-15, fused_per_flop=3e-15),
    "cuda half": replace(CUDA, per_entry=11e-12, per_flop=4.6e-15, fused_per_flop=1.5e-15),
}
Form = Literal["batched", "directional", "fused"]


@lru_cache(maxsize=8)
def cost_model(kind: str) -> CostModel:
    """The constants of a kind of device (`fused.arithmetic`): calibrated on this machine, or those that are shipped."""
    from assay.capture.calibration import calibrated  # which measures what is below

    return calibrated(kind) or SHIPPED.get(kind, SHIPPED["cuda"])


@lru_cache(maxsize=4096)
def cheapest(
    batch: int, positions: int, p: int, d: int, targets: int, kind: str = "cpu", with_fused: bool = False
) -> Form:
    """The form with the least time on top of the weight gradient, which is needed as well."""
    cost = cost_model(kind)
    seconds: dict[Form, float] = {
        "batched": cost.batched(batch, p, d, targets),
        "directional": cost.directional(batch, positions, p, d, targets),
    }
    if with_fused:
        seconds["fused"] = cost.fused(batch, positions, p, d, targets)
    return min(seconds, key=lambda form: seconds[form])


def directional(moved: list[Tensor], b: Tensor, layout: Layout) -> Tensor:
    """`[targets, B]`: ⟨∂L/∂y_i, y'_i⟩ for output changes `moved`, each of b's shape."""
    wide = torch.promote_types(b.dtype, torch.float32)
    return torch.stack([layout.per_sample_sum(y.to(wide) * b) for y in moved])


def per_sample_products(a: Tensor, b: Tensor, layout: Layout, directions: Tensor) -> Tensor:
    """`[targets, B]`: ⟨Σ_t b_it ⊗ a_it, G_n⟩ where the weight gradient itself is not wanted.

    Args:
        a: `[…, d]` activations.
        b: `[…, p]` gradients of the output.
        layout: where the samples are in b (and in a).
        directions: `[targets, p, d]`.
    """
    G = directions.to(a.dtype)
    moved = [(a @ g.t()) for g in G]
    return directional(moved, b, layout)


def weight_gradient_and_products(
    a: Tensor, b: Tensor, layout: Layout, directions: Tensor, room: Room | None = None
) -> tuple[Tensor, Tensor]:
    """The weight gradient `[p, d]` and `[targets, B]` inner products, by the cheapest form; memory from `room`."""
    d, p = a.shape[-1], b.shape[-1]
    batch = layout.batch
    positions = b.numel() // max(p * batch, 1)
    regular = layout.labels is None and layout.dim < b.dim() - 1
    kind = arithmetic(a)
    form = (
        cheapest(batch, positions, p, d, directions.shape[0], kind, available(a, b))
        if regular
        else "directional"
    )
    if form == "directional":
        return b.reshape(-1, p).t() @ a.reshape(-1, d), per_sample_products(a, b, layout, directions)
    a, b = layout.grouped(a).reshape(batch, -1, d), layout.grouped(b).reshape(batch, -1, p)
    return fused(a, b, directions) if form == "fused" else batched(a, b, directions, cost_model(kind), room)


def per_sample_gradients(
    a: Tensor, b: Tensor, layout: Layout, room: Room | None = None, low: bool = False
) -> Blocks | None:
    """`[B, p, d]` written out, a block of samples at a time, where their memory is worth the time; None otherwise.

    The batched product replaces the weight-gradient GEMM, so that these gradients cost memory traffic only, while a
    kept pair (a, b) costs one more GEMM later. The pair holds `T·(p + d)` entries per sample against `p·d`: less for
    wide layers and short samples, more for long ones.

    Args:
        a: `[…, d]` activations.
        b: `[…, p]` gradients of the output.
        layout: where the samples are in both.
        room: what memory is taken from.
        low: hold them in bfloat16 where they are float32.
    """
    d, p, batch = a.shape[-1], b.shape[-1], layout.batch
    positions = b.numel() // max(p * batch, 1)
    regular = layout.labels is None and layout.dim < b.dim() - 1
    pair, dense = positions * (p + d), p * d
    affordable = (
        dense <= 4 * pair and batch * dense * a.element_size() <= cost_model(a.device.type).kept_bytes
    )
    if not regular or not (dense <= pair or affordable):
        return None
    a, b = layout.grouped(a).reshape(batch, -1, d), layout.grouped(b).reshape(batch, -1, p)
    return Blocks(a, b, room, low and a.dtype == torch.float32)


class Blocks:
    """Per-sample gradients `b_iᵀ a_i`, formed a block at a time: what else needs a block finds it in the cache.

    Args:
        a: `[B, T, d]`.
        b: `[B, T, p]`.
        room: what memory is taken from; without one all samples are one block.
        low: hold them in bfloat16.

    Attributes:
        whole: `[B, p, d]`, filled as far as the iteration has come.
    """

    def __init__(self, a: Tensor, b: Tensor, room: Room | None, low: bool) -> None:
        self._a, self._b, self._room = a, b, room
        self._shape = (len(a), b.shape[2], a.shape[2])
        if room is not None:
            self.whole = room.empty(self._shape, torch.bfloat16 if low else a.dtype, a.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """The samples of a block, and their gradients `[samples, p, d]`; not to be kept."""
        batch, p, d = self._shape
        a, b = self._a, self._b
        if self._room is None:  # in a compiler's hands
            self.whole = torch.bmm(b.transpose(1, 2), a)
            yield slice(None), self.whole
            return
        whole = self.whole
        block = cost_model(a.device.type).samples_per_block(p, d, a.element_size())
        apart = (
            None if whole.dtype == a.dtype else self._room.empty((min(block, batch), p, d), a.dtype, a.device)
        )
        for start in range(0, batch, block):
            part = slice(start, min(start + block, batch))
            out = whole[part] if apart is None else apart[: part.stop - start]
            torch.bmm(b[part].transpose(1, 2), a[part], out=out)
            if apart is not None:
                whole[part] = out
            yield part, out


def batched(
    a: Tensor, b: Tensor, directions: Tensor, cost: CostModel, room: Room | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks of per-sample gradients, summed and dotted before the next block is formed.

    Large gradients are formed one by one: plain products, sums and dots of one matrix share their work out to the
    threads evenly, where a batched product hands each thread whole matrices and waits for the slowest. Small ones are
    formed in as few blocks as the cache allows (benchmarks/contractions.py).

    Args:
        a: `[B, T, d]`.
        b: `[B, T, p]`.
        directions: `[targets, p, d]`.
        cost: how large a block may be.
        room: what memory is taken from.
    """
    batch, d, p = a.shape[0], a.shape[2], b.shape[2]
    alone = cost.forms_alone(p, d, a.element_size())
    wide = torch.promote_types(a.dtype, torch.float32)
    G = directions.reshape(-1, p * d).to(wide)  # [targets, p·d]
    total = torch.empty(p * d, dtype=wide, device=a.device)
    products = torch.empty(batch, G.shape[0], dtype=wide, device=a.device)
    block = 1 if alone else min(batch, cost.samples_per_block(p, d, a.element_size()))
    shape = (block, p, d)
    place = (
        torch.empty(shape, dtype=a.dtype, device=a.device)
        if room is None
        else room.empty(shape, a.dtype, a.device)
    )
    form = _in_runs if alone else _in_blocks
    form(a, b.mT, G, place, total, products)
    return total.view(p, d).to(a.dtype), products.t()


def _in_blocks(a: Tensor, bt: Tensor, G: Tensor, place: Tensor, total: Tensor, products: Tensor) -> None:
    """Fill `total` `[p·d]` and `products` `[B, targets]`."""
    batch, block = len(a), len(place)
    ones = total.new_ones(block)
    total.zero_()
    for start in range(0, batch, block):  # a few iterations
        stop = min(start + block, batch)
        g = torch.bmm(bt[start:stop], a[start:stop], out=place[: stop - start])
        flat = g.view(stop - start, -1).to(G.dtype)
        total.addmv_(flat.t(), ones[: stop - start])
        if len(G) == 1:
            torch.mv(flat, G[0], out=products[start:stop, 0])
        else:
            torch.mm(flat, G.t(), out=products[start:stop])


def _in_runs(a: Tensor, bt: Tensor, G: Tensor, place: Tensor, total: Tensor, products: Tensor) -> None:
    """The same for gradients so large that three calls for each cost nothing beside it.

    Where the products are made in the precision of their total, they add up `TOGETHER` gradients by themselves, and
    each sum so far is dotted: one pass over memory less for each. The difference of two such dots is a sample's own,
    with the rounding of a sum of no more than `TOGETHER`. A gradient with more columns than rows is formed in two
    halves, which the threads share more evenly.
    """
    halves = 2 if place.shape[1] < place.shape[2] else 1
    x = a.chunk(halves, 2)
    adds_up = place.dtype == total.dtype
    together = TOGETHER if adds_up else 1
    for start in range(0, len(a), together):
        run = slice(start, start + together)
        flat = total if adds_up and not start else place.view(-1)  # the first run lies in the total itself
        g = flat.view(place.shape[1:]).chunk(halves, 1)
        for i, (yt, product) in enumerate(zip(bt[run].unbind(), products[run].unbind(), strict=True), start):
            for columns, own in zip(g, x, strict=True):
                columns.addmm_(yt, own[i], beta=int(i > start))  # with 0, what was there is not read
            if len(G) == 1:
                torch.dot(flat.to(G.dtype), G[0], out=product[0])
            else:
                torch.mv(G, flat.to(G.dtype), out=product)
        products[run][1:] = products[run].diff(dim=0)
        if flat is not total:
            (total.add_ if start else total.copy_)(flat)
