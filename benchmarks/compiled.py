"""What in-run values add to a step of a compiled model, beside the eager one.

Arms, each with an eager and a compiled model: the plain step, the same after one gradient of the validation loss that
is thrown away (pass), and the loop inside `assay.Run` with one first-order target (assay). All arms run in one
process, one step of each per round in an order drawn for it (`rounds`); a ratio is taken within a round, to the plain
step of the same kind of model. What compiling takes (the first steps of an arm) is reported apart.

    python benchmarks/compiled.py            # some minutes on two cores, most of it compiling
    python benchmarks/compiled.py --quick    # one small model, nothing written
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from overhead import OPTIMIZERS, RESULTS, Size, build, machine
from rich.console import Console
from rich.table import Table
from rounds import Step, in_rounds, summary

import assay

KINDS = ("plain", "pass", "assay")
MODELS = ("eager", "compiled")
SIZES = [Size(8, 256, 256, 2)]
QUICK = [Size(4, 64, 64, 2)]


def arm(size: Size, options: argparse.Namespace, optimizer: str, model_kind: str, kind: str) -> Step:
    """One training step of that kind, on a model of its own."""
    device = torch.device(options.device)
    made, loss_fn = build(size, options.family)
    made.to(device)
    model: Any = (
        torch.compile(made, backend=options.backend, dynamic=False) if model_kind == "compiled" else made
    )
    opt = OPTIMIZERS[optimizer](model)
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.context + 1)
    batch = torch.randint(512, shape, generator=generator).to(device)
    held_out = torch.randint(512, (1, shape[1]), generator=generator).to(device)

    def update() -> None:
        opt.step()
        opt.zero_grad()

    def plain() -> None:
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        update()

    def with_pass() -> None:
        torch.autograd.grad(loss_fn(model, held_out), list(model.parameters()))
        plain()

    if kind != "assay":
        return plain if kind == "plain" else with_pass
    method = assay.InRunShapley({"held out": assay.Target([held_out], loss_fn)})
    run = assay.Run(model, opt, methods=[method], check="off")
    ids = list(range(size.batch))

    def with_assay() -> None:
        with run.step(ids):
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        update()

    return with_assay


def measure(size: Size, optimizer: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per arm: seconds, ratio to the plain step of the same kind, how far above the bare pass."""
    device = torch.device(options.device)
    order = [(model, kind) for model in MODELS for kind in KINDS]
    arms, first = {}, {}
    for key in order:
        arms[key] = arm(size, options, optimizer, *key)
        started = time.perf_counter()
        for _ in range(options.warmup):
            arms[key]()
        first[key] = time.perf_counter() - started
    taken = in_rounds(arms, options.rounds, device=device)
    return [row(size, optimizer, key, taken, first[key]) for key in order]


def row(
    size: Size, optimizer: str, key: tuple[str, str], taken: dict[tuple[str, str], list[float]], first: float
) -> dict[str, Any]:
    """The figures of one arm."""
    model, kind = key
    plain, bare = taken[model, "plain"], taken[model, "pass"]
    return {
        "size": size._asdict(),
        "optimizer": optimizer,
        "model": model,
        "arm": kind,
        "first_steps_seconds": first,
        "seconds": summary(taken[key]),
        "ratio": summary([a / b for a, b in zip(taken[key], plain, strict=True)]),
        "above_pass": summary([(a - v) / p for a, v, p in zip(taken[key], bare, plain, strict=True)]),
        "to_eager_assay": summary([a / b for a, b in zip(taken[key], taken["eager", "assay"], strict=True)]),
    }


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows as a table."""
    table = Table(
        title="one training step; ratios to the plain step of the same kind of model: medians (quartiles)"
    )
    for column in ("size", "optimizer", "model", "arm", "seconds", "ratio", "above pass", "first steps"):
        table.add_column(column, no_wrap=True)
    for r in rows:
        ratio = r["ratio"]
        spread = f"({ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f})"
        table.add_row(
            str(Size(**r["size"])), r["optimizer"], r["model"], r["arm"], f"{r['seconds']['median']:.4f}",
            f"{ratio['median']:.3f} {spread}", f"{r['above_pass']['median']:+.3f}", f"{r['first_steps_seconds']:.1f}",
        )  # fmt: skip
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="compiled", description=(__doc__ or "").split("\n")[0])
    result.add_argument("--quick", action="store_true", help="one small model; writes only to --out")
    result.add_argument(
        "--size", type=Size.parse, action="append", metavar="BxTxD[xLAYERS]",
        help="batch, context, width and layers; may be repeated",
    )  # fmt: skip
    result.add_argument("--family", choices=("gpt", "gpt2"), default="gpt")
    result.add_argument("--backend", default="inductor", help="of torch.compile")
    result.add_argument("--optimizer", choices=list(OPTIMIZERS), action="append")
    result.add_argument("--rounds", type=int, default=20)
    result.add_argument("--warmup", type=int, default=3, help="steps of each arm before; they compile")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--device", default="cpu")
    result.add_argument("--out", type=Path, help="JSON file (results/compiled-FAMILY-DEVICE.json)")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the results."""
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes = options.size or (QUICK if options.quick else SIZES)
    console = Console()
    console.width = max(console.width, 110)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for optimizer in options.optimizer or list(OPTIMIZERS):
            torch._dynamo.reset()
            console.print(f"measuring {size}, {optimizer}, on {options.device}, {options.rounds} rounds")
            rows += measure(size, optimizer, options)
    show(rows, console)
    out = options.out
    if out is None and not options.quick:
        out = RESULTS / f"compiled-{options.family}-{torch.device(options.device).type}.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "rounds": options.rounds,
            "warmup": options.warmup,
            "family": options.family,
            "backend": options.backend,
        }
        document = {"machine": machine(options), "settings": settings, "rows": rows}
        out.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"written to {out}")


if __name__ == "__main__":
    main()
