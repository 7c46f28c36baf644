"""What values cost beside a training step, side by side, and the page that says it.

Arms on the main size, for SGD and AdamW: the plain step, the same after a bare validation pass, every path of in-run
values, `left` with a target's gradient for four steps, recording for data value embeddings at two ranks with and
without a support, and the two direct methods: a forward and backward pass per sample (direct), and `torch.func` over
the samples (func), each dotted with the target's gradient. Further models and sizes with the first order alone. Then
the first order over more samples, tokens and targets, with a least-squares line through what it adds to the plain step.
Beside the arms of the main size those of `peers.py`, where they are installed.

One step of each arm per round, in an order drawn for it (`rounds`); ratios are taken within a round, to the plain step
of the same optimizer; medians and quartiles. Beside them the quickest step of an arm over the quickest plain one, which
what else the machine does touches least. Rounds end when their share of the time is spent; the first order has rounds
of its own. The arms of a model and optimizer share a process, which keeps freed memory (`allocator.py` says what is
lost where it is not kept); each model and size, each line, has one of its own, so that none begins with the heap that
others left.

    python benchmarks/performance.py            # about 12 minutes on two cores; JSON, docs/performance.md and its plot
    python benchmarks/performance.py --quick    # seconds, nothing written but to --out
    python benchmarks/performance.py --page     # the page alone, from the JSON
    python benchmarks/performance.py --device cuda  # the tables of `gpu`, and the page
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import gpu
import overhead
import peers
import performance_page
from overhead import OPTIMIZERS, RESULTS, VOCABULARY, Size
from rounds import Arm, Step, in_rounds, summary

import assay
from assay.allocator import keep_freed_memory

FIRST = ("plain", "pass", "assay", "assay left@4")
FURTHER = (
    "plain", "pass", "assay trapezoid", "assay simpson", "assay hessian",
    "record 16", "record 16:64", "record 64", "record 64:128", "direct", "func",
)  # fmt: skip
MAIN = Size(16, 256, 384, 2)
OTHERS = [
    ("gpt2", Size(8, 256, 256, 2)), ("gpt2", Size(4, 512, 768, 1)), ("gpt2", Size(32, 64, 256, 2)),
    ("llama", Size(8, 256, 256, 2)), ("llama", Size(4, 512, 512, 1)), ("llama", Size(32, 64, 256, 2)),
]  # fmt: skip
BASE = Size(8, 128, 192, 2)
ALONG = {"samples": (4, 8, 16, 32), "tokens": (64, 128, 256, 512), "targets": (1, 2, 4, 8)}
QUICK = Size(4, 16, 32, 1)
Found = TypeVar("Found")


def arm(family: str, size: Size, optimizer: str, kind: str, options: Namespace, targets: int = 1) -> Step:
    """One training step of that kind, on a model of its own."""
    own = kind in ("direct", "func") or kind.startswith("record") or targets > 1 or family == "llama"
    if not own:
        return overhead.arm(
            Namespace(family=family, device=options.device, accumulate=1), size, optimizer, kind
        )
    device = torch.device(options.device)
    model, loss_fn = (
        (llama(size), overhead.hugging_face_loss) if family == "llama" else overhead.build(size, family)
    )
    model.to(device)
    opt = OPTIMIZERS[optimizer](model)
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.context + 1)
    batch = torch.randint(VOCABULARY, shape, generator=generator).to(device)
    held_out = [
        torch.randint(VOCABULARY, (1, shape[1]), generator=generator).to(device) for _ in range(targets)
    ]

    def update() -> None:
        opt.step()
        opt.zero_grad()

    def plain() -> None:
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        update()

    def bare() -> list[list[Tensor]]:
        return [list(torch.autograd.grad(loss_fn(model, x), list(model.parameters()))) for x in held_out]

    def with_pass() -> None:
        bare()
        plain()

    if kind == "plain":
        return plain
    if kind == "pass":
        return with_pass
    if kind == "direct":
        return lambda: one_by_one(model, loss_fn, batch, bare(), update)
    if kind == "func":
        return lambda: by_functions(model, loss_fn, batch, bare(), update)
    run = assay.Run(model, opt, methods=[method(kind, held_out, loss_fn)], check="off")
    ids = list(range(size.batch))

    def with_assay() -> None:
        with run.step(ids):
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        update()

    return with_assay


def method(kind: str, held_out: list[Tensor], loss_fn: Callable[[nn.Module, Tensor], Tensor]) -> Any:
    """In-run values of a path, or the recording of embeddings at a rank, RANK or RANK:SUPPORT."""
    if kind.startswith("record"):
        rank, _, support = kind.split()[1].partition(":")
        return assay.DataValueEmbedding(
            assay.Projection(int(rank), support=int(support) if support else None)
        )
    named = {f"held out {n}": assay.Target([x], loss_fn) for n, x in enumerate(held_out)}
    path, _, every = (kind.removeprefix("assay").strip() or "left").partition("@")
    return assay.InRunShapley(named, path, refresh=int(every or 1))


def llama(size: Size) -> nn.Module:
    """Llama's blocks with random weights: RMSNorm, rotary positions, gated perceptrons, grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, size.width // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=8 * size.width // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=size.context,
    )
    return LlamaForCausalLM(config)


def one_by_one(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Tensor], Tensor],
    batch: Tensor,
    directions: list[list[Tensor]],
    update: Callable[[], None],
) -> Tensor:
    """`[targets, B]`: the direct method, a micro-batch of one sample at a time; then the step."""
    params = list(model.parameters())
    scores = []
    for n in range(len(batch)):
        found = torch.autograd.grad(loss_fn(model, batch[n : n + 1]) / len(batch), params)
        scores.append(torch.stack([dot(found, G) for G in directions]))
        for p, g in zip(params, found, strict=True):
            p.grad = g if p.grad is None else p.grad.add_(g)
    update()
    return torch.stack(scores, 1)


def by_functions(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Tensor], Tensor],
    batch: Tensor,
    directions: list[list[Tensor]],
    update: Callable[[], None],
) -> Tensor:
    """`[targets, B]`: per-sample gradients by `torch.func.vmap(grad)`, written out and dotted; then the step."""
    named = dict(model.named_parameters())

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, row: Tensor) -> Tensor:
            return loss_fn(self.model, row[None])

    wrapped = Loss()

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found: Tensor = torch.func.functional_call(
                wrapped, {f"model.{k}": v for k, v in values.items()}, (row,)
            )
        return found / len(batch)

    held = {k: p.detach() for k, p in named.items()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")(held, batch)
    scores = [
        torch.stack([each[k].flatten(1) @ g.flatten() for k, g in zip(named, G, strict=True)]).sum(0)
        for G in directions
    ]
    for k, p in named.items():
        p.grad = each[k].sum(0)
    update()
    return torch.stack(scores)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩ over all parameters."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def timed(arms: dict[Arm, Step], options: Namespace, limit: float) -> dict[Arm, list[float]]:
    """Seconds of each round; two rounds at least, then until the time is spent."""
    return in_rounds(
        arms, options.rounds, warmup=options.warmup, least=3, limit=limit, device=torch.device(options.device)
    )


def rows(taken: dict[str, list[float]], **what: Any) -> list[dict[str, Any]]:
    """One row per arm: seconds, ratio to the plain step, how far above the bare pass."""
    plain, bare = taken["plain"], taken["pass"]
    quick = {name: min(found) for name, found in taken.items()}
    return [
        {
            **what,
            "arm": name,
            "rounds": len(found),
            "seconds": summary(found),
            "ratio": summary([a / p for a, p in zip(found, plain, strict=True)]),
            "above_pass": summary([(a - v) / p for a, v, p in zip(found, bare, plain, strict=True)]),
            "quickest": quick[name] / quick["plain"],
            "quickest_above_pass": (quick[name] - quick["pass"]) / quick["plain"],
        }
        for name, found in taken.items()
    ]


def slope(along: str, options: Namespace) -> dict[str, Any]:
    """What the first order adds to the plain step over samples, tokens or targets, and a line through it."""
    numbers = ALONG[along][:2] if options.quick else ALONG[along]
    arms: dict[tuple[int, str], Step] = {}
    for n in numbers:
        size = (QUICK if options.quick else BASE)._replace(
            **({"batch": n} if along == "samples" else {"context": n} if along == "tokens" else {})
        )
        targets = n if along == "targets" else 1
        for kind in ("plain", "assay"):
            arms[n, kind] = arm("gpt", size, "sgd", kind, options, targets)
    # all sizes in each round: the machine's pace is the same for all
    taken = timed(arms, options, 0.2 * options.seconds / len(ALONG))
    pairs = {n: list(zip(taken[n, "assay"], taken[n, "plain"], strict=True)) for n in numbers}
    added = [summary([a - p for a, p in pairs[n]])["median"] for n in numbers]
    ratios = [summary([a / p for a, p in pairs[n]])["median"] for n in numbers]
    return {
        "along": along,
        "numbers": numbers,
        "added_seconds": added,
        "ratio": ratios,
        **line(numbers, added),
    }


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line y = intercept + slope · x, and the share of y's variance that it explains."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    slope = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
    intercept = b.mean() - slope * a.mean()
    left = (b - intercept - slope * a).square().sum()
    r2 = 1 - left / (b - b.mean()).square().sum().clamp_min(1e-300)
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(r2)}


def every_path(optimizer: str, options: Namespace) -> list[dict[str, Any]]:
    """The main table's rows of one optimizer."""
    size = QUICK if options.quick else MAIN
    what = {"table": "main", "family": "gpt", "size": size._asdict(), "optimizer": optimizer}
    first = {kind: arm("gpt", size, optimizer, kind, options) for kind in FIRST}
    found = rows(timed(first, options, 0.15 * options.seconds), **what)
    arms = {kind: arm("gpt", size, optimizer, kind, options) for kind in FURTHER}
    arms |= {
        name: peers.arm(name, size, optimizer, torch.device(options.device)) for name in peers.installed()
    }
    further = rows(timed(arms, options, 0.15 * options.seconds), **what)
    return found + [row for row in further if row["arm"] not in FIRST]


def other(family: str, size: Size, options: Namespace) -> list[dict[str, Any]]:
    """The first order's rows of one further model and size."""
    size = QUICK if options.quick else size
    arms = {kind: arm(family, size, "sgd", kind, options) for kind in ("plain", "pass", "assay", "direct")}
    taken = timed(arms, options, 0.25 * options.seconds / len(OTHERS))
    return rows(taken, table="others", family=family, size=size._asdict(), optimizer="sgd")


def measure(options: Namespace) -> dict[str, Any]:
    """All tables, each with its share of the time."""
    started = time.perf_counter()

    def alone(work: Callable[..., Found], *arguments: Any) -> Found:
        if options.quick:
            return work(*arguments, options)
        found = in_fresh_process(work, *arguments, options)
        print(f"{work.__name__} {arguments[0]}: {time.perf_counter() - started:.0f} s", flush=True)
        return found

    tables = [alone(every_path, optimizer) for optimizer in OPTIMIZERS]
    tables += [alone(other, family, size) for family, size in OTHERS[:: 3 if options.quick else 1]]
    lines = [alone(slope, along) for along in ALONG]
    return {
        "rows": [row for table in tables for row in table],
        "slopes": lines,
        "left_out": peers.left_out(),
        "took_seconds": round(time.perf_counter() - started),
    }


def in_fresh_process(work: Callable[..., Found], *arguments: Any) -> Found:
    """What a function of this file returns in a fresh process, set up as this one."""
    with ProcessPoolExecutor(1, get_context("spawn"), settle, (torch.get_num_threads(),)) as pool:
        return pool.submit(work, *arguments).result()


def settle(threads: int) -> None:
    """Make this process one to measure in."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON and the page."""
    parser = argparse.ArgumentParser(prog="performance", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes only to --out")
    parser.add_argument("--page", action="store_true", help="write the page from the JSON, measure nothing")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="about how long to measure, warm-up not counted"
    )
    parser.add_argument("--rounds", type=int, default=40, help="of each arm at most")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file (results/performance-DEVICE.json)")
    options = parser.parse_args(argv)
    settle(options.threads)
    if options.quick:
        options.seconds, options.rounds = min(options.seconds, 2.0), min(options.rounds, 3)
    out = options.out or RESULTS / f"performance-{torch.device(options.device).type}.json"
    if not options.page:
        settings = {"seconds": options.seconds, "rounds": options.rounds, "warmup": options.warmup}
        on_gpu = torch.device(options.device).type == "cuda"
        found = gpu.measure(options) if on_gpu else measure(options)
        document = {"machine": overhead.machine(options), "settings": settings, **found}
        print(performance_page.on_a_gpu(document) if on_gpu else performance_page.page(document))
        if options.quick and options.out is None:
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.out is None:
        performance_page.write(*performance_page.documents())


if __name__ == "__main__":
    main()
