"""The tables of `performance.py` that need a GPU: GPT-2 small as the paper trains it, and Llama's shape at 8 billion.

    python benchmarks/performance.py --device cuda      # JSON, and the section "On a GPU" of docs/performance.md

* gpt2: GPT-2 small, T 1024, B 16, one held-out sequence, weights in float32 under bfloat16 autocast, eager and
  compiled, for SGD and AdamW: the plain step, a bare validation pass, the first order (with a gradient for four steps
  as well), trapezoid (exact, and with a correction in bfloat16), and one sample at a time.
* llama: 32 layers of width 4096, grouped queries, 128k tokens, random weights in bfloat16, every layer under activation
  checkpointing, SGD without momentum: the plain step, a bare validation pass, the first order.

All arms of GPT-2 train one model, each with an optimizer of its own, one step of each per round in an order drawn for
it (`rounds`). Llama's come one after the other, each with a model of its own, as no two fit. Peak memory is that of an
arm alone. What does not run is reported so.
"""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from rounds import Step, in_rounds, seconds, summary
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import assay


class Shape(NamedTuple):
    """A model and a micro-batch."""

    family: str
    batch: int
    context: int
    width: int
    layers: int
    heads: int
    vocabulary: int


GPT2, LLAMA = Shape("gpt2", 16, 1024, 768, 12, 12, 50257), Shape("llama", 4, 2048, 4096, 32, 32, 128256)
QUICK = Shape("gpt2", 3, 16, 32, 2, 2, 64), Shape("llama", 2, 16, 32, 2, 4, 64)
ARMS = (
    "plain", "pass", "assay left", "assay left@4", "assay trapezoid", "assay trapezoid:reduced", "direct",
)  # fmt: skip
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=1e-3),
    "adamw": lambda model: AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
}


def model_of(shape: Shape, device: torch.device) -> nn.Module:
    """With random weights, made on the device; Llama's in bfloat16 and checkpointed."""
    import transformers as hf

    torch.manual_seed(0)
    if shape.family == "gpt2":
        config = hf.GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
            n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        with device:
            return hf.GPT2LMHeadModel(config)
    config = hf.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=7 * shape.width // 2,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 4), max_position_embeddings=shape.context,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = hf.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    # the name that transformers gives it since version 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model.train()


def loss_of(shape: Shape, device: torch.device) -> Callable[[nn.Module, Tensor], Tensor]:
    """Mean next-token cross-entropy; GPT-2's products in bfloat16."""
    narrow = shape.family == "gpt2"

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext():
            loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    return loss_fn


def arm(shape: Shape, called: nn.Module, optimizer: str, kind: str, device: torch.device) -> Step:
    """One training step of that kind, on a given model with an optimizer of its own."""
    from performance import one_by_one

    opt, loss_fn = OPTIMIZERS[optimizer](called), loss_of(shape, device)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(shape.vocabulary, (shape.batch + 1, shape.context), generator=generator).to(device)
    batch, held_out = rows[1:], rows[:1]

    def update() -> None:
        opt.step()
        opt.zero_grad()

    def plain() -> None:
        loss_fn(called, batch).backward()  # type: ignore[no-untyped-call]
        update()

    def bare() -> list[Tensor]:
        return list(torch.autograd.grad(loss_fn(called, held_out), list(called.parameters())))

    def with_pass() -> None:
        bare()
        plain()

    if kind in ("plain", "pass"):
        return plain if kind == "plain" else with_pass
    if kind == "direct":
        return lambda: one_by_one(called, loss_fn, batch, [bare()], update)
    choice, _, every = kind.removeprefix("assay ").partition("@")
    path, _, memory = choice.partition(":")
    target = assay.Target([held_out], loss_fn)
    method = assay.InRunShapley(target, path, memory=memory or "keep", refresh=int(every or 1))
    run, ids = assay.Run(called, opt, methods=[method], check="off"), list(range(shape.batch))

    def with_assay() -> None:
        with run.step(ids):
            loss_fn(called, batch).backward()  # type: ignore[no-untyped-call]
        update()

    return with_assay


def table(
    shape: Shape, optimizer: str, compiled: bool, kinds: Sequence[str], options: Namespace, together: bool
) -> list[dict[str, Any]]:
    """A row per arm: seconds, ratio to the plain step, peak bytes; or why it could not be measured."""
    what = {"family": shape.family, "shape": shape._asdict(), "optimizer": optimizer, "compiled": compiled}
    rounds = 1 if together else options.rounds
    apart = {kind: alone(shape, optimizer, compiled, kind, options, rounds) for kind in kinds}
    taken = {kind: found for kind, (found, _) in apart.items() if not isinstance(found, str)}
    if together:
        taken = interleaved(shape, optimizer, compiled, list(taken), options)
    rows: list[dict[str, Any]] = [
        {
            **what,
            "arm": kind,
            "rounds": len(found),
            "seconds": summary(found),
            "ratio": summary([a / p for a, p in zip(found, taken["plain"], strict=True)]),
            "peak_bytes": apart[kind][1],
        }
        for kind, found in taken.items()
        if "plain" in taken
    ]
    return rows + [
        {**what, "arm": kind, "failed": found} for kind, (found, _) in apart.items() if isinstance(found, str)
    ]


def interleaved(
    shape: Shape, optimizer: str, compiled: bool, kinds: Sequence[str], options: Namespace
) -> dict[str, list[float]]:
    """Seconds of each round, all arms on one model."""
    device = torch.device(options.device)
    model = model_of(shape, device)
    called = torch.compile(model) if compiled else model
    arms = {kind: arm(shape, called, optimizer, kind, device) for kind in kinds}
    return in_rounds(arms, options.rounds, warmup=options.warmup, device=device)


def alone(
    shape: Shape, optimizer: str, compiled: bool, kind: str, options: Namespace, rounds: int
) -> tuple[list[float] | str, int | None]:
    """Seconds of the steps of an arm on a model of its own, or why it does not run; peak bytes on a GPU."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    found: list[float] | str
    step: Step | None = None
    try:
        model = model_of(shape, device)
        step = arm(shape, torch.compile(model) if compiled else model, optimizer, kind, device)
        found = [seconds(step, device) for _ in range(options.warmup + rounds)][options.warmup :]
    except RuntimeError as error:  # too large for the device, which is a RuntimeError as well
        found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    step = model = None  # type: ignore[assignment]
    gc.collect()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    if on_gpu:
        torch.cuda.empty_cache()
    return found, peak


def measure(options: Namespace) -> dict[str, Any]:
    """Both tables."""
    started = time.perf_counter()
    gpt2, llama = QUICK if options.quick else (GPT2, LLAMA)
    found: list[dict[str, Any]] = []
    for optimizer in ("sgd",) if options.quick else OPTIMIZERS:
        for compiled in (False,) if options.quick else (False, True):
            found += table(gpt2, optimizer, compiled, ARMS, options, together=True)
            print(f"gpt2, {optimizer}: {time.perf_counter() - started:.0f} s", flush=True)
    found += table(llama, "sgd", False, ARMS[:4], options, together=False)
    return {"rows": found, "took_seconds": round(time.perf_counter() - started)}
