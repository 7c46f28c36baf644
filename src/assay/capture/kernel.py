"""The Triton kernel behind `fused`: a weight gradient that is dotted with directions sample by sample as it is summed.

One program owns one tile of the weight gradient, `[BLOCK_P, BLOCK_D]`, and goes through samples one after the other:

    own   = Σ_t b_it ⊗ a_it      in registers, as in any matrix product
    total = total + own          in registers
    score = ⟨own, G_n⟩           over the tile, for every direction n

and writes `total` once, and one number per sample and direction. A sample's gradient never leaves the registers, and as
each number is written by one program alone, there are no atomics and the result is the same every time.

Where a layer has fewer tiles than the device has processors, several programs share a tile, each for some of the
samples; their totals and the tiles' scores are added up afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # an extra; `fused` asks before it comes here
    triton = None

__all__ = ["launch"]

SHARED = 8  # programs that share a tile at most: each of them writes a total of its own
# BLOCK_P, BLOCK_D, BLOCK_T, warps, stages; the first where nothing may be tried out
TILES = (
    (64, 64, 32, 4, 3), (64, 64, 64, 4, 2), (128, 64, 32, 8, 4), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3),
    (128, 128, 64, 8, 3), (32, 64, 32, 4, 2),
)  # fmt: skip
SMALLEST = (32, 64)  # tile, by which room for scores is made

if triton is not None:

    @triton.jit(do_not_specialize=["samples", "length"])
    def weight_gradient_and_products(
        a, b, directions, totals, scores,
        samples, T, P, D, targets, share, length,
        a_sample, a_row, a_column, b_sample, b_row, b_column, g_target, g_row, g_column,
        BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
        SUM: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    ):  # fmt: skip
        # Tile `program_id(0)` of the weight gradient over the `share` samples of part `program_id(1)`.
        # a `[samples, T, D]`, b `[samples, T, P]`, directions `[targets, P, D]`, each with its strides in entries;
        # totals `[parts, P, D]` and scores `[tiles, targets, samples]`, contiguous, are written.
        # length: the size class of T, by which the choice of a tile is kept. SUM: what sums are held in. PRECISION: of
        # products of float32. WIDEN: multiply in SUM, since the interpreter has no bfloat16 arithmetic.
        tile, part = tl.program_id(0), tl.program_id(1)
        across = tl.cdiv(D, BLOCK_D)
        row, column = (tile // across) * BLOCK_P, (tile % across) * BLOCK_D
        rows, columns, steps = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
        is_row, is_column = row + rows < P, column + columns < D
        # 64 bits for where a tile begins, 32 within it: registers are what this is short of
        wide_row, wide_column = tl.cast(row, tl.int64), tl.cast(column, tl.int64)
        a += wide_column * a_column
        b += wide_row * b_column
        directions += wide_row * g_row + wide_column * g_column
        total = tl.zeros((BLOCK_P, BLOCK_D), dtype=SUM)
        first = part * share
        for i in range(first, tl.minimum(first + share, samples)):
            own = tl.zeros((BLOCK_P, BLOCK_D), dtype=SUM)
            a_here, b_here = a + tl.cast(i, tl.int64) * a_sample, b + tl.cast(i, tl.int64) * b_sample
            for start in range(0, T, BLOCK_T):
                is_step, wide_start = start + steps < T, tl.cast(start, tl.int64)
                y = tl.load(
                    b_here + wide_start * b_row + (steps[:, None] * b_row + rows[None, :] * b_column),
                    mask=is_step[:, None] & is_row[None, :],
                    other=0.0,
                )
                x = tl.load(
                    a_here + wide_start * a_row + (steps[:, None] * a_row + columns[None, :] * a_column),
                    mask=is_step[:, None] & is_column[None, :],
                    other=0.0,
                )
                if WIDEN:
                    y, x = y.to(SUM), x.to(SUM)
                own = tl.dot(tl.trans(y), x, own, input_precision=PRECISION, out_dtype=SUM)
            total += own
            for n in range(targets):
                G = tl.load(
                    directions
                    + tl.cast(n, tl.int64) * g_target
                    + (rows[:, None] * g_row + columns[None, :] * g_column),
                    mask=is_row[:, None] & is_column[None, :],
                    other=0.0,
                )
                score = tl.sum(own * G.to(SUM))
                tl.store(scores + (tile * targets + n) * samples + i, score)
        totals += (tl.cast(part, tl.int64) * P + wide_row) * D + wide_column
        tl.store(
            totals + (rows[:, None] * D + columns[None, :]),
            total.to(totals.dtype.element_ty),
            mask=is_row[:, None] & is_column[None, :],
        )

    tuned = triton.autotune(
        configs=[
            triton.Config({"BLOCK_P": p, "BLOCK_D": d, "BLOCK_T": t}, num_warps=warps, num_stages=stages)
            for p, d, t, warps, stages in TILES
        ],
        key=["P", "D", "targets", "length", "PRECISION"],
        reset_to_zero=["scores"],  # a larger tile fills fewer of them than the one that was tried before it
    )(weight_gradient_and_products)


def launch(
    a: Tensor, b: Tensor, directions: Tensor, precision: str = "ieee", tune: bool = True
) -> tuple[Tensor, Tensor]:
    """The weight gradient `[p, d]` and `[targets, B]` inner products; nothing waits for the device.

    Args:
        a: `[B, T, d]`.
        b: `[B, T, p]`, of the same dtype.
        directions: `[targets, p, d]`.
        precision: of products of float32, "ieee" or "tf32".
        tune: try the tiles out, once per layer's shape and device; else the first is taken.

    Raises:
        Exception: whatever Triton raises where it cannot compile or launch.
    """
    samples, T, D = a.shape
    P, targets = b.shape[2], len(directions)
    wide = torch.promote_types(a.dtype, torch.float32)
    parts, share = _parts(a, P)
    smallest = triton.cdiv(P, SMALLEST[0]) * triton.cdiv(D, SMALLEST[1])
    totals = torch.empty(parts, P, D, dtype=a.dtype if parts == 1 else wide, device=a.device)
    scores = torch.zeros(smallest, targets, samples, dtype=wide, device=a.device)
    named: dict[str, Any] = {
        "SUM": {torch.float32: tl.float32, torch.float64: tl.float64}[wide],
        "PRECISION": precision,
        "WIDEN": a.device.type == "cpu",
    }
    kernel = tuned
    if not tune:
        block_p, block_d, block_t, warps, stages = TILES[0]
        kernel = weight_gradient_and_products
        named |= {"BLOCK_P": block_p, "BLOCK_D": block_d, "BLOCK_T": block_t}
        named |= {"num_warps": warps, "num_stages": stages}
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        kernel[lambda meta: (triton.cdiv(P, meta["BLOCK_P"]) * triton.cdiv(D, meta["BLOCK_D"]), parts)](
            a, b, directions, totals, scores, samples, T, P, D, targets, share, T.bit_length(),
            *a.stride(), *b.stride(), *directions.stride(), **named,
        )  # fmt: skip
    total = totals[0] if parts == 1 else totals.sum(0).to(a.dtype)
    return total, scores.sum(0)


def _parts(a: Tensor, P: int) -> tuple[int, int]:
    """In how many parts the samples are shared out, and how many each has: about two programs per processor."""
    samples, _, D = a.shape
    processors = 1
    if a.device.type == "cuda":
        processors = torch.cuda.get_device_properties(a.device).multi_processor_count
    tiles = triton.cdiv(P, 128) * triton.cdiv(D, 64)
    share = triton.cdiv(samples, max(1, min(samples, SHARED, 2 * processors // tiles)))
    return triton.cdiv(samples, share), share
