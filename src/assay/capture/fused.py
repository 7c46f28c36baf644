"""The fused form of the contraction: a Triton kernel as an operation of torch, and what happens where it cannot run.

As an operation it is one node of a compiled graph, whose outputs are known before it runs, and it allocates through
torch, so that CUDA graphs record it. Where Triton cannot compile or launch the kernel, or the kernel fails the small
problem that it is put to before its first use, one warning says so and the batched form takes its place for good.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from assay.errors import AssayWarning

__all__ = ["arithmetic", "available", "fused"]

TYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
TOLERANCE = {  # of the problem before the first use: inputs are exact, so that only products and sums round
    "ieee": 1e-5,
    "tf32": 1e-2,
    "half": 1e-2,
}
_found_sound: dict[tuple[torch.device, str], bool] = {}


def arithmetic(a: Tensor) -> str:
    """How its device multiplies such matrices, by which the cost model differs: "cpu", "cuda", "cuda tf32", others."""
    kind = a.device.type
    if kind == "cpu":
        return kind
    if a.dtype in (torch.bfloat16, torch.float16):
        return f"{kind} half"
    return f"{kind} tf32" if a.dtype == torch.float32 and precision() == "tf32" else kind


def precision() -> str:
    """What torch may round the operands of float32 products to on a GPU: "tf32", or "ieee" for not at all."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since torch 2.9
    if setting is None:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "tf32" if setting == "tf32" else "ieee"


def available(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel may be asked: a GPU, Triton, and numbers that it is made for.

    Args:
        a: `[B, T, d]`.
        b: `[B, T, p]`.
    """
    if a.dtype != b.dtype or not a.numel() or not b.numel() or not _found_sound.get(_key(a), True):
        return False
    if a.device.type == "cuda":
        return a.dtype in TYPES and _installed()
    return a.device.type == "cpu" and _interpreted()


def _key(a: Tensor) -> tuple[torch.device, str]:
    return a.device, str(a.dtype)


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    """Whether Triton runs kernels on the host, number by number: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed()


def fused(a: Tensor, b: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The weight gradient `[p, d]` and `[targets, B]` inner products.

    Args:
        a: `[B, T, d]`.
        b: `[B, T, p]`.
        directions: `[targets, p, d]`.
    """
    found: tuple[Tensor, Tensor] = torch.ops.assay.weight_gradient_and_products(a, b, directions)
    return found


def _run(a: Tensor, b: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    try:
        if _sound(a):
            from assay.capture.kernel import launch

            return launch(a, b, directions, precision(), tune=_may_wait(a))
    except Exception as error:  # of Triton's, whatever it is: training goes on
        _give_up(a, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    from assay.capture.contraction import batched, cost_model

    total, products = batched(a, b, directions, cost_model(arithmetic(a)))
    return total, products.contiguous()


def _shapes(a: Tensor, b: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors as `_run` returns them, without data."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (
        a.new_empty(b.shape[2], a.shape[2]),
        a.new_empty(directions.shape[0], a.shape[0], dtype=wide),
    )


def _may_wait(a: Tensor) -> bool:
    """Whether the host may wait for the device now: to try tiles out, and to look at a result."""
    return a.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _sound(a: Tensor) -> bool:
    """Whether the kernel solves a small problem right on this device; found out once, before a graph is recorded."""
    key = _key(a)
    if key not in _found_sound:
        if a.device.type != "cuda":
            return True
        if not _may_wait(a):
            return False
        from assay.capture.kernel import launch

        generator = torch.Generator().manual_seed(0)
        x, y, G = (
            torch.randn(shape, generator=generator).to(a.device, a.dtype)
            for shape in ((3, 37, 70), (3, 37, 45), (2, 45, 70))
        )
        total, scores = launch(x, y, G, precision(), tune=False)
        each = torch.einsum("btp,btd->bpd", y.double(), x.double())
        rounding = TOLERANCE["half" if a.dtype != torch.float32 else precision()]
        right = _near(total, each.sum(0), rounding) and _near(
            scores, torch.einsum("bpd,npd->nb", each, G.double()), rounding
        )
        _found_sound[key] = right
        if not right:
            _give_up(a, "it computes something else")
    return _found_sound[key]


def _near(found: Tensor, truth: Tensor, rounding: float) -> bool:
    return bool((found.double() - truth).norm() <= rounding * truth.norm())


def _give_up(a: Tensor, reason: str) -> None:
    _found_sound[_key(a)] = False
    warnings.warn(
        f"the fused kernel cannot be used for {str(a.dtype).removeprefix('torch.')} on {a.device} ({reason}); values "
        "are as exact by the batched form, which writes per-sample gradients to memory.",
        AssayWarning,
        stacklevel=2,
    )


_LIBRARY = torch.library.Library("assay", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "weight_gradient_and_products(Tensor a, Tensor b, Tensor directions) -> (Tensor, Tensor)"
)
_LIBRARY.impl(  # type: ignore[no-untyped-call]
    "weight_gradient_and_products", _run, "CompositeExplicitAutograd"
)
torch.library.register_fake("assay::weight_gradient_and_products", _shapes, lib=_LIBRARY)
