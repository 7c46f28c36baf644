"""A step with assay never waits for the device: nothing is read back, and nothing is copied to it or from it.

The training runs on torch's `meta` device, whose tensors have no data: whatever would have to know a number of the
device (`item`, `bool`, `nonzero`, a copy to the host) fails there, and a dispatch mode names every tensor that changes
device. Where there is a GPU, the same loop runs with CUDA's own check for synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import CASES
from reference.cases import Batch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import assay
from assay.capture.bottleneck import Sides
from assay.embedding import session
from assay.methods.session import InRunSession

READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique2", "_unique2"}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1),
    "sgd momentum": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01),
    "adamw, rate on the device": lambda m: AdamW(
        m.parameters(), lr=torch.full((), 0.01, device=next(m.parameters()).device), capturable=True
    ),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "left, sgd": ("sgd", {}),
    "left, momentum": ("sgd momentum", {}),
    "left, adamw": ("adamw", {}),
    "left, rate on the device": ("adamw, rate on the device", {}),
    "left, refresh": ("sgd", {"refresh": 4}),
    "left, refresh, adamw": ("adamw", {"refresh": 4}),
    "trapezoid, adamw": ("adamw", {"path": "trapezoid"}),
    "trapezoid, reduced": ("adamw", {"path": "trapezoid", "memory": "reduced"}),
    "simpson, sgd": ("sgd", {"path": "simpson"}),
    "tokens": ("adamw", {"granularity": "token"}),
    "hessian, sgd": ("sgd", {"path": "hessian"}),
    "momentum shared out": ("sgd momentum", {"momentum": "exact"}),
    "momentum by sketches": ("sgd momentum", {"momentum": "sketch", "sketch": 31}),
}


class Waiting(TorchDispatchMode):
    """Collects what makes the host wait for the device `kind`: reads of numbers, and copies to and from it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.found = kind, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        name = func.overloadpacket.__name__
        if name in READS and self.kind in before:
            self.found.append(name)
        out = func(*args, **(kwargs or {}))
        after = {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)}
        moved = name in ("_to_copy", "copy_", "_copy_from") and len(before | after) > 1
        if moved and not (kwargs or {}).get("non_blocking"):
            self.found.append(f"{name}: {before} to {after}")
        if name == "index" and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1] if self.kind in before
        ):
            self.found.append("index by a mask")
        return out


@contextmanager
def no_numbers_sent(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> Iterator[None]:
    """Notes tensors that are made of numbers of the host on a device; no dispatch shows that on `meta`."""

    def watched(name: str, original: Any) -> Any:
        def make(data: Any, *args: Any, **kwargs: Any) -> Tensor:
            made: Tensor = original(data, *args, **kwargs)
            if made.device.type != "cpu" and not isinstance(data, Tensor):
                found.append(f"torch.{name}({data!r}) on {made.device}")
            return made

        return make

    with monkeypatch.context() as patch:
        for name in ("tensor", "as_tensor", "asarray"):
            patch.setattr(torch, name, watched(name, getattr(torch, name)))
        yield


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What assay asks of every device and `meta` has no answer to: autocast, and whether the first loss is a number."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(
        torch,
        "is_autocast_enabled",
        lambda kind=None: kind != "meta" and (enabled() if kind is None else enabled(kind)),
    )
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, **options: nullcontext() if kind == "meta" else autocast(kind, **options),
    )
    monkeypatch.setattr(InRunSession, "_check_losses", lambda self: setattr(self, "_first", False))


def loop(
    device: str, optimizer: str, methods: Callable[[Batch], list[Any]], **options: Any
) -> Iterator[None]:
    """A training with assay, one step per iteration."""
    case = CASES["gpt"]
    loss = case.losses["token_mean"]
    model = case.model(torch.float32).to(device)
    opt = OPTIMIZERS[optimizer](model)
    batch, held_out = (
        {name: x.to(device) for name, x in case.batch(n, seed=n, dtype=torch.float32).items()} for n in (4, 2)
    )
    run = assay.Run(model, opt, methods=methods(held_out), check="off", **options)
    while True:
        for part in range(2):
            with run.step(range(4 * part, 4 * part + 4)):
                loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        opt.step()
        opt.zero_grad()
        yield


def in_run(held_out: Batch, options: dict[str, Any]) -> list[Any]:
    loss = CASES["gpt"].losses["token_mean"]
    return [
        assay.InRunShapley(
            {"a": assay.Target([held_out], loss), "b": assay.Target([held_out], loss)}, **options
        )
    ]


ON_META = [
    name for name, (optimizer, _) in METHODS.items() if "rate" not in optimizer
]  # torch has that on GPUs alone


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("name", ON_META)
def test_no_step_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five watched steps one renews a gradient that serves four, and is valued by both."""
    optimizer, options = METHODS[name]
    steps = loop("meta", optimizer, lambda held_out: in_run(held_out, options))
    next(steps)
    with Waiting("meta") as mode, no_numbers_sent(monkeypatch, mode.found):
        for _ in range(5 if "refresh" in options else 2):
            next(steps)
    assert not mode.found


class OnTheWay:
    """In place of `Hosted`: rows of `meta` that have come to the host, where they are zeros."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape

    def wait(self) -> Tensor:
        return torch.zeros(self.shape)


def moved(sides: Sides, device: torch.device) -> Sides:
    """In place of `Sides.to`, once per run: the projections on a device, zeros where they come from `meta`."""
    parts = (None if x is None else torch.zeros(x.shape, device=device) for x in (sides.left, sides.right))
    return Sides(sides.shape, *parts)


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw"])
def test_recording_does_not_wait(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of embeddings and the step's own numbers leave by copies that another thread waits for."""
    monkeypatch.setattr(session, "Hosted", OnTheWay)
    monkeypatch.setattr(session, "balanced", lambda sides, D: (sides, sides))  # once per run, on the host
    monkeypatch.setattr(Sides, "to", moved)
    method = assay.DataValueEmbedding(assay.Projection(rank=2))
    steps = loop("meta", optimizer, lambda held_out: [method], out=tmp_path / "run")
    next(steps)
    with Waiting("meta") as mode, no_numbers_sent(monkeypatch, mode.found):
        next(steps)
        next(steps)
    assert not mode.found


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda x: torch.tensor(float(x.numel()), device=x.device),
    "a copy there": lambda x: torch.ones(2, 3).to(x.device),
    "a mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "a truth": lambda x: bool(x.any()),
    "equal": lambda x: torch.equal(x, x),
    "the host": lambda x: x.cpu(),
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above would say nothing."""
    failed = False
    with Waiting("meta") as mode, no_numbers_sent(monkeypatch, mode.found):
        try:
            WAITS[what](torch.ones(2, 3, device="meta"))
        except (RuntimeError, NotImplementedError):
            failed = True
    assert failed or mode.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_a_gpu(name: str) -> None:
    optimizer, options = METHODS[name]
    steps = loop("cuda", optimizer, lambda held_out: in_run(held_out, options))
    next(steps)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
