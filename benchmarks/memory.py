"""What each form of the targets' gradient takes at its peak, and what bfloat16 and a truncated rank cost in accuracy.

Peaks: a GPT whose weights are more than its activations, one held-out sequence, with activation checkpoints around its
blocks and without; for each form of `target_gradient` three steps of each arm in a process of its own, measured as
`overhead.py` does. The figure is what an arm needs beyond the plain step, in copies of the weights.

Errors: the same runs with the gradient in full and in bfloat16, on `assay demo`'s corpus and model and on 1,000 digits
of MNIST: rank correlation of the samples' values, and how far the account closes less. Truncated: each matrix of the
demo model's validation gradient by its leading singular vectors, and what finding them costs.

    python benchmarks/memory.py            # about 5 minutes on two cores; JSON and its part of docs/performance.md
    python benchmarks/memory.py --quick    # under a minute, nothing written but to --out
    python benchmarks/memory.py --page     # the page alone, from the JSON
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import overhead
import performance
import performance_page
from overhead import OPTIMIZERS, RESULTS, VOCABULARY, Size
from rounds import Step, seconds, synchronize

import assay
from assay.demo import CORPUS, SETTINGS

FORMS = ("full", "bfloat16", "cpu", "factors")
ARMS = {  # by optimizer: path, and what waits for the gradient
    "sgd left": ("sgd", "left", "keep"),
    "adamw left": ("adamw", "left", "recompute"),
    "adamw trapezoid": ("adamw", "trapezoid", "recompute"),
}
SIZE, QUICK = Size(2, 64, 768, 6), Size(2, 16, 64, 2)
RANKS = (4, 16, 64)


def arm(size: Size, kind: str, form: str, checkpoints: bool, device: torch.device) -> Step:
    """One training step; `kind` is a key of ARMS or "plain OPTIMIZER"."""
    model, loss_fn = overhead.build(size, "gpt")
    model.to(device)
    if checkpoints:
        for block in model.blocks:  # type: ignore[union-attr]
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.context + 1)
    batch, held_out = (
        torch.randint(VOCABULARY, (n, shape[1]), generator=generator).to(device) for n in (shape[0], 1)
    )

    def plain() -> None:
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    if kind.startswith("plain"):
        optimizer = OPTIMIZERS[kind.split()[1]](model)
        return plain
    name, path, memory = ARMS[kind]
    optimizer = OPTIMIZERS[name](model)
    target = assay.Target([held_out], loss_fn)
    method = assay.InRunShapley(target, path, memory=memory, target_gradient=form)
    run = assay.Run(model, optimizer, methods=[method], check="off")
    ids = list(range(size.batch))

    def with_assay() -> None:
        with run.step(ids):
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return with_assay


def peak(options: Namespace, size: Size) -> int:
    """Bytes that three steps of one arm need at most, its model with them."""
    kind, form, checkpoints = options.peak_of
    device = torch.device(options.device)
    before = overhead.resident_peak(afresh=True)
    step = arm(size, kind, form, checkpoints == "checkpoints", device)
    for _ in range(3):
        step()
    synchronize(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return overhead.resident_peak() - before


def measured(options: Namespace, size: Size, kind: str, form: str, checkpoints: bool) -> int:
    """`peak` in a process of its own."""
    (found,) = overhead.in_own_process(
        __file__, "--device", options.device, "--threads", options.threads,
        *(["--quick"] if options.quick else []),
        "--peak-of", kind, form, "checkpoints" if checkpoints else "none",
        environment=overhead.GIVES_BACK,
    )  # fmt: skip
    return found


def peaks(options: Namespace, size: Size) -> dict[str, Any]:
    """Rows by arm, form and checkpoints: peak bytes, and how many copies of the weights above the plain step."""
    model, _ = overhead.build(size, "gpt")
    copy = sum(p.nbytes for p in model.parameters())
    rows = []
    for checkpoints in (False, True):
        plain = {
            name: measured(options, size, f"plain {name}", "full", checkpoints)
            for name in dict.fromkeys(name for name, _, _ in ARMS.values())
        }
        for kind, (name, _, _) in ARMS.items():
            for form in FORMS:
                found = measured(options, size, kind, form, checkpoints)
                rows.append(
                    {"arm": kind, "form": form, "checkpoints": checkpoints, "peak_bytes": found,
                     "plain_bytes": plain[name], "copies": (found - plain[name]) / copy}
                )  # fmt: skip
                print(f"{kind}, {form}, checkpoints {checkpoints}: {rows[-1]['copies']:.2f}", flush=True)
    return {"size": size._asdict(), "weights_bytes": copy, "rows": rows}


def compared(full: Any, low: Any) -> dict[str, float]:
    """The worst target's rank correlation of the samples' values, and the largest change of the explained share."""
    ranks, gaps = [], []
    for name in full.targets:
        a, b = (ledger.values(name).sort("id") for ledger in (full, low))
        ranks.append(float(spearmanr(a["value"], b["value"]).statistic))
        shares = []
        for ledger in (full, low):
            account = ledger.account(name)
            told = sum(account[line].sum() for line in ("predicted", "carried", "decayed"))
            shares.append(told / account["actual"].sum())
        gaps.append((abs(shares[1] - shares[0]), shares[0]))
    worst, share = max(gaps)
    return {"rank_correlation": min(ranks), "gap": worst, "explained": share, "targets": len(ranks)}


def demo(options: Namespace) -> list[dict[str, Any]]:
    """`assay demo`'s corpus and model, the path left and its own trapezoid, in full and in bfloat16."""
    from assay.train import load_config, train

    steps = 4 if options.quick else 40
    found = []
    for path in ("left", "trapezoid"):
        ledgers = []
        with tempfile.TemporaryDirectory() as folder:
            for form in ("full", "bfloat16"):
                changes = {
                    "data.path": CORPUS, "out": Path(folder) / form, "train.steps": steps,
                    "attribution.path": path, "attribution.measure_every": 0,
                    "attribution.target_gradient": form,
                }  # fmt: skip
                train(load_config(SETTINGS, changes))
                ledgers.append(assay.open(Path(folder) / form))
            found.append({"run": "demo", "path": path, "steps": steps, **compared(*ledgers)})
        print(found[-1], flush=True)
    return found


def mnist(options: Namespace) -> list[dict[str, Any]]:
    """The perceptron of experiments/truth/mnist.py, 24 held-out images as one target, two optimizers."""
    from experiments.truth import mnist as truth

    data = truth.digits(dtype=torch.float32)
    order = data.order[: 8 if options.quick else None]
    held_out = tuple(torch.cat(parts) for parts in zip(*data.queries, strict=True))
    found = []
    for name in ("SGD 0.2", "AdamW 5e-4"):
        ledgers = []
        for form in ("full", "bfloat16"):
            model = truth.network(dtype=torch.float32)
            optimizer = truth.build(name, model)
            target = assay.Target([held_out], truth.loss_fn)
            with assay.Run(
                model, optimizer, methods=[assay.InRunShapley(target, "trapezoid", target_gradient=form)]
            ) as run:
                for ids in order:
                    with run.step(ids):
                        truth.loss_fn(model, data.batch(ids)).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
            ledgers.append(run.ledger)
        found.append(
            {"run": f"MNIST, {name}", "path": "trapezoid", "steps": len(order), **compared(*ledgers)}
        )
        print(found[-1], flush=True)
    return found


def truncated(options: Namespace) -> list[dict[str, Any]]:
    """Values at the weights after a few steps, with each matrix of ∇ℓ by r singular vectors: error and time."""
    size = QUICK if options.quick else Size(8, 128, 256, 4)
    model, loss_fn = overhead.build(size, "gpt")
    optimizer = OPTIMIZERS["adamw"](model)
    generator = torch.Generator().manual_seed(1)
    # tokens with something to learn: each is a function of the one before it, three times of four
    rows = torch.randint(VOCABULARY, (size.batch + 1, size.context + 1), generator=generator)
    for t in range(size.context):
        known = torch.rand(len(rows), generator=generator) < 0.75
        rows[known, t + 1] = (7 * rows[known, t] + 3) % VOCABULARY
    batch, held_out = rows[:-1], rows[-1:]
    for _ in range(3 if options.quick else 60):
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    params = list(model.parameters())

    def validation() -> list[Tensor]:
        return list(torch.autograd.grad(loss_fn(model, held_out), params))

    gradient, bare = validation(), best(validation)
    matrices = [k for k, p in enumerate(params) if p.dim() == 2]
    each = [list(torch.autograd.grad(loss_fn(model, batch[n : n + 1]), params)) for n in range(size.batch)]
    exact = torch.stack([performance.dot(g, gradient) for g in each])
    found = []
    for rank in RANKS:

        def cut(rank: int = rank) -> list[Tensor]:
            return [leading(g, rank) if k in matrices else g for k, g in enumerate(gradient)]

        low = cut()
        values = torch.stack([performance.dot(g, low) for g in each])
        held = sum(min(rank, *gradient[k].shape) * sum(gradient[k].shape) for k in matrices)
        found.append(
            {
                "rank": rank,
                "error": float((values - exact).norm() / exact.norm()),
                "share_of_memory": held / sum(gradient[k].numel() for k in matrices),
                "share_of_pass": best(cut) / bare,
            }
        )
        print(found[-1], flush=True)
    rounded = [g.bfloat16().float() for g in gradient]
    values = torch.stack([performance.dot(g, rounded) for g in each])
    error = float((values - exact).norm() / exact.norm())
    found.append({"rank": "all, in bfloat16", "error": error, "share_of_memory": 0.5, "share_of_pass": 0.0})
    print(found[-1], flush=True)
    return found


def leading(g: Tensor, rank: int) -> Tensor:
    """`g` by its leading singular vectors, found by two rounds of subspace iteration."""
    if rank >= min(g.shape):
        return g
    u, s, v = torch.svd_lowrank(g, q=rank, niter=2)
    return (u * s) @ v.t()


def best(work: Step, times: int = 5) -> float:
    """Seconds of the fastest of a few calls."""
    return min(seconds(work) for _ in range(times))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON and the page."""
    parser = argparse.ArgumentParser(prog="memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes only to --out")
    parser.add_argument("--page", action="store_true", help="write the page from the JSON, measure nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file (results/memory-DEVICE.json)")
    parser.add_argument("--peak-of", nargs=3, metavar=("ARM", "FORM", "CHECKPOINTS"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else SIZE
    if options.peak_of:
        print(peak(options, size))
        return
    out = options.out or RESULTS / f"memory-{torch.device(options.device).type}.json"
    if not options.page:
        started = time.perf_counter()
        document = {
            "machine": overhead.machine(options),
            "peaks": peaks(options, size),
            "errors": [*mnist(options), *demo(options)],
            "truncated": truncated(options),
            "took_seconds": round(time.perf_counter() - started),
        }
        if options.quick and options.out is None:
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    main_results = RESULTS / "performance-cpu.json"
    if options.out is None and main_results.exists():
        performance_page.write(json.loads(main_results.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
