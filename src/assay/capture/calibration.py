"""The constants of the contractions' cost model, measured on this machine and kept for the runs that follow.

For some linear layers the plain weight-gradient product, the batched form (with blocks of several sizes) and the
directional form are timed in turn, and on a GPU the fused form too, for each kind of arithmetic that it has. What a
form adds to the plain product, over the work that it adds, gives a constant per layer; the median is kept, and the
block size whose added time over all layers is least. They go into `contraction.json` in the configuration folder
(`$ASSAY_CONFIG`, or `$XDG_CONFIG_HOME/assay`, or `~/.config/assay`), by kind of arithmetic, with a description of the
machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from assay.capture import contraction
from assay.capture.contraction import SHIPPED, CostModel, per_sample_products
from assay.capture.fused import available, fused
from assay.capture.layout import Layout
from assay.errors import AssayWarning

__all__ = ["LAYERS", "QUICK", "calibrated", "keep", "kinds", "measure", "place"]

Layer = tuple[int, int, int, int]  # B, T, d, p
LAYERS: Sequence[Layer] = [
    (16, 256, 384, 384), (16, 256, 384, 1536), (16, 256, 1536, 384), (8, 512, 768, 768), (16, 64, 384, 1536),
    (32, 16, 384, 384), (64, 4, 256, 256), (64, 1, 784, 512),
]  # fmt: skip
QUICK: Sequence[Layer] = [(4, 64, 64, 64), (64, 1, 64, 64)]
BLOCKS = tuple(size << 20 for size in (2, 5, 10, 20, 40))


def place() -> Path:
    """The file that the constants are kept in."""
    own = os.environ.get("ASSAY_CONFIG")
    base = Path(own) if own else Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "assay"
    return base.expanduser() / "contraction.json"


def kinds(device: torch.device) -> list[str]:
    """The kinds of arithmetic (`fused.arithmetic`) of a device."""
    return ["cuda", "cuda tf32", "cuda half"] if device.type == "cuda" else [device.type]


def calibrated(kind: str) -> CostModel | None:
    """The constants that were measured for a kind of arithmetic; None, with a warning, where they cannot be used."""
    file = place()
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["devices"].get(kind)
        return None if found is None else _validated(found["constants"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{file} holds no constants that can be used ({type(error).__name__}: {error}); those that are shipped are "
            "taken. Run `assay bench calibrate` again, or remove the file.",
            AssayWarning,
            stacklevel=2,
        )
        return None


def _validated(constants: dict[str, Any]) -> CostModel:
    names = {field.name for field in fields(CostModel)}
    if set(constants) != names:
        raise ValueError(f"expected {', '.join(sorted(names))}")
    for name, value in constants.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is no number")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be above 0")
    whole = {name: int(constants[name]) for name in ("kept_bytes", "block_bytes", "alone_bytes")}
    return CostModel(**{**constants, **whole})


def keep(measured: CostModel, device: torch.device, kind: str | None = None) -> Path:
    """Write the constants of one kind of arithmetic of a device, beside those of others, in one piece."""
    file = place()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        devices = dict(json.loads(file.read_text(encoding="utf-8"))["devices"])
    except (OSError, ValueError, KeyError, TypeError):
        devices = {}
    machine = {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    devices[kind or device.type] = {"constants": asdict(measured), "machine": machine}
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"devices": devices}, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    contraction.cost_model.cache_clear()
    contraction.cheapest.cache_clear()
    return file


def measure(
    device: torch.device, layers: Sequence[Layer] = LAYERS, rounds: int = 9, kind: str | None = None
) -> CostModel:
    """Time every form of every layer in turn; `rounds` timed ones after two to warm up.

    Args:
        device: to measure on.
        layers: to time.
        rounds: of each.
        kind: of arithmetic, one of `kinds(device)`; the first if left out.
    """
    kind = kind or kinds(device)[0]
    shipped = SHIPPED.get(kind, SHIPPED["cuda"])
    added: dict[int, float] = dict.fromkeys(BLOCKS, 0.0)
    by_layer: list[tuple[Layer, dict[Any, float]]] = []
    with _multiplying(kind):
        for layer in layers:
            dtype = torch.bfloat16 if kind.endswith("half") else torch.float32
            seconds = _seconds(_forms(layer, device, shipped, dtype), device, rounds)
            by_layer.append((layer, seconds))
            for block in BLOCKS:
                added[block] += max(seconds[block] - seconds["plain"], 0.0)
    block = min(BLOCKS, key=lambda size: added[size])
    entries, flops, slower = [], [], []
    for (batch, positions, d, p), seconds in by_layer:
        entries.append(max(seconds[block] - seconds["plain"], 1e-9) / (batch * p * d))
        flops.append(max(seconds["directional"] - seconds["plain"], 1e-9) / (2 * batch * positions * p * d))
        if "fused" in seconds:
            rest = seconds["fused"] - seconds["plain"] - batch * p * d * shipped.fused_per_entry
            slower.append(max(rest, 1e-9) / (2 * batch * positions * p * d))
    found = replace(
        shipped, per_entry=statistics.median(entries), per_flop=statistics.median(flops), block_bytes=block
    )
    return replace(found, fused_per_flop=statistics.median(slower)) if slower else found


@contextmanager
def _multiplying(kind: str) -> Iterator[None]:
    """Products of float32 in tf32 inside, or not, where the kind says so."""
    if kind not in ("cuda", "cuda tf32"):
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "cuda tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _forms(
    layer: Layer, device: torch.device, shipped: CostModel, dtype: torch.dtype
) -> dict[Any, Callable[[], Any]]:
    """The plain product, the directional form, the batched one by its block size, and the fused one if there is one."""
    batch, positions, d, p = layer
    a, b = (torch.randn(batch, positions, width, device=device, dtype=dtype) for width in (d, p))
    directions, layout = torch.randn(1, p, d, device=device, dtype=dtype), Layout(0, batch)
    flat_a, flat_b = a.view(-1, d), b.view(-1, p)
    forms: dict[Any, Callable[[], Any]] = {
        "plain": lambda: flat_b.t() @ flat_a,
        "directional": lambda: (flat_b.t() @ flat_a, per_sample_products(a, b, layout, directions)),
    }
    for size in BLOCKS:
        forms[size] = partial(contraction.batched, a, b, directions, replace(shipped, block_bytes=size))
    if available(a, b):
        forms["fused"] = partial(fused, a, b, directions)
    return forms


def _seconds(forms: dict[Any, Callable[[], Any]], device: torch.device, rounds: int) -> dict[Any, float]:
    """Median seconds of each, in an order drawn for every round: what ran before leaves its mark on the caches."""
    taken: dict[Any, list[float]] = {name: [] for name in forms}
    drawn = random.Random(0)
    for number in range(rounds + 2):
        for name in drawn.sample(list(forms), len(forms)):
            start = time.perf_counter()
            forms[name]()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number >= 2:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}
