"""What in-run values add to a training step: time and memory, beside the step alone and a bare validation pass.

Arms, for SGD and for AdamW:

* plain: forward, backward, `optimizer.step()`, `zero_grad()`;
* pass: the same after one gradient of the validation loss by `torch.autograd.grad`, which is thrown away;
* assay: the same loop inside `assay.Run` with one first-order target, and with `--path` higher orders beside it, each
  with the choice of what waits for the step's right end (`--path trapezoid:reduced`) and of how many steps a target's
  gradient serves (`--path left@4`).

All arms run in one process, which keeps freed memory (`allocator.py` says what is lost where it is not kept), one step
of each per round in an order drawn for it (`rounds`). A ratio is taken within a round, to the plain step of the same
optimizer; the table gives medians and quartiles of the ratios. Peak memory is measured in a process of its own for each
arm, in which glibc gives every freed block of 128 KiB or more back at once, so that the peak is that of what is in use.

    python benchmarks/overhead.py            # the sizes of docs/results.md, about half an hour on two cores
    python benchmarks/overhead.py --quick    # one small model, under a minute, nothing written
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rounds import Step, in_rounds, summary, synchronize
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import assay
from assay.allocator import keep_freed_memory
from assay.demo.gpt import GPT, GPTConfig

VOCABULARY = 512
RESULTS = Path(__file__).parent / "results"


class Size(NamedTuple):
    """Sizes of a model and its batches; the validation batch is one sample."""

    batch: int
    context: int
    width: int
    layers: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From `BxTxD` or `BxTxDxLAYERS`."""
        numbers = [int(number) for number in text.lower().split("x")]
        if len(numbers) not in (3, 4) or min(numbers) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no size: write BxTxD or BxTxDxLAYERS, say 16x256x384"
            )
        batch, context, width, layers = numbers if len(numbers) == 4 else [*numbers, 4]
        return cls(batch, context, width, layers)

    def __str__(self) -> str:
        return "x".join(map(str, self))


SIZES = [Size(16, 256, 384, 4), Size(8, 256, 256, 4), Size(8, 512, 768, 2)]
QUICK = [Size(4, 64, 64, 2)]
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.01, momentum=0.9),
    "adamw": lambda model: AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
}
KINDS = ("plain", "pass", "assay")
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment of a process whose allocator gives memory back at once."""


def lm_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy over `[B, T + 1]` tokens."""
    loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])
    return loss


def hugging_face_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The same of a `GPT2LMHeadModel`, which shifts the labels itself."""
    loss: Tensor = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
    return loss


def build(size: Size, family: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A GPT of that size, always with the same weights, and its loss."""
    torch.manual_seed(0)
    heads = max(1, size.width // 64)
    if family == "gpt":
        return GPT(GPTConfig(VOCABULARY, size.context, size.layers, heads, size.width)), lm_loss
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=size.context, n_embd=size.width, n_layer=size.layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), hugging_face_loss


def arm(options: argparse.Namespace, size: Size, optimizer: str, kind: str) -> Step:
    """One training step of that kind, on a model of its own."""
    device, parts = torch.device(options.device), options.accumulate
    model, loss_fn = build(size, options.family)
    model.to(device)
    opt = OPTIMIZERS[optimizer](model)
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.context + 1)
    batch = torch.randint(VOCABULARY, shape, generator=generator).to(device)
    held_out = torch.randint(VOCABULARY, (1, shape[1]), generator=generator).to(device)

    def train() -> None:
        for _ in range(parts):
            (loss_fn(model, batch) / parts).backward()  # type: ignore[no-untyped-call]
        update()

    def update() -> None:
        opt.step()
        opt.zero_grad()

    def with_pass() -> None:
        torch.autograd.grad(loss_fn(model, held_out), list(model.parameters()))
        train()

    if kind == "plain":
        return train
    if kind == "pass":
        return with_pass
    target = assay.Target([held_out], loss_fn)
    choice, _, every = (kind.removeprefix("assay").strip() or "left").partition("@")
    path, _, memory = choice.partition(":")
    method = assay.InRunShapley({"held out": target}, path, memory=memory or "keep", refresh=int(every or 1))
    run = assay.Run(model, opt, methods=[method], check="off")
    ids = list(range(size.batch))

    def with_assay() -> None:
        for _ in range(parts):
            with run.step(ids):
                (loss_fn(model, batch) / parts).backward()  # type: ignore[no-untyped-call]
        update()

    return with_assay


def measure_time(size: Size, options: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Seconds of each round by optimizer and kind; the first `warmup` rounds are not in them."""
    device = torch.device(options.device)
    arms = {
        (optimizer, kind): arm(options, size, optimizer, kind)
        for optimizer in OPTIMIZERS
        for kind in (*KINDS, *(f"assay {path}" for path in options.path))
    }
    return in_rounds(arms, options.rounds, warmup=options.warmup, device=device)


def measure_memory(size: Size, options: argparse.Namespace, optimizer: str, kind: str) -> int:
    """Peak bytes of three steps of one arm, in a process of its own."""
    (found,) = in_own_process(
        __file__, "--peak-of", optimizer, kind, "--size", size, "--family", options.family,
        "--device", options.device, "--threads", options.threads, "--accumulate", options.accumulate,
        environment=GIVES_BACK,
    )  # fmt: skip
    return found


def in_own_process(
    script: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> list[int]:
    """The numbers in the last line that a benchmark prints in a process of its own.

    Args:
        script: its file.
        arguments: of its command line.
        environment: what is set beside this process's own.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


def peak(size: Size, options: argparse.Namespace) -> int:
    """Bytes that three steps of the arm `peak_of` need at most, its model with them.

    On a CPU what the resident memory grew by since before the model, on a GPU what was allocated.
    """
    device = torch.device(options.device)
    before = resident_peak(afresh=True)
    step = arm(options, size, *options.peak_of)
    for _ in range(3):
        step()
    synchronize(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_peak() - before


def resident_peak(afresh: bool = False) -> int:
    """Bytes that this process had resident at most until now; `afresh` first forgets what was before, on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used
    if afresh:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def measure(size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per arm: seconds, ratio to the plain step, how far above the bare pass (also of the quickest), bytes."""
    times = measure_time(size, options)
    rows: list[dict[str, Any]] = []
    for (optimizer, kind), taken in times.items():
        plain, bare = times[optimizer, "plain"], times[optimizer, "pass"]
        row: dict[str, Any] = {
            "size": size._asdict(),
            "optimizer": optimizer,
            "arm": kind,
            "seconds": summary(taken),
            "ratio": summary([a / b for a, b in zip(taken, plain, strict=True)]),
            "above_pass": summary([(a - v) / p for a, v, p in zip(taken, bare, plain, strict=True)]),
            "quickest_above_pass": (min(taken) - min(bare)) / min(plain),
            "peak_bytes": None if options.no_memory else measure_memory(size, options, optimizer, kind),
        }
        rows.append(row)
    return rows


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    device = torch.device(options.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "assay": importlib.metadata.version("assay"),
    }


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows as a table."""
    table = Table(title="one training step; ratios to the plain step: medians (quartiles)", min_width=80)
    for column in ("size", "optimizer", "arm", "seconds", "ratio", "above pass", "MiB"):
        table.add_column(column, justify="left" if column in ("optimizer", "arm") else "right", no_wrap=True)
    for row in rows:
        ratio, above = row["ratio"], row["above_pass"]
        spread = f"({ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f})"
        table.add_row(
            str(Size(**row["size"])),
            row["optimizer"],
            row["arm"],
            f"{row['seconds']['median']:.4f}",
            "1" if row["arm"] == "plain" else f"{ratio['median']:.3f} {spread}",
            f"{above['median']:+.3f}" if row["arm"].startswith("assay") else "",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
        )
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="overhead", description=(__doc__ or "").split("\n")[0])
    result.add_argument(
        "--quick", action="store_true", help="one small model and few rounds; writes only to --out"
    )
    result.add_argument(
        "--size", type=Size.parse, action="append", metavar="BxTxD[xLAYERS]",
        help="batch, context, width and layers (4 if left out); may be repeated",
    )  # fmt: skip
    result.add_argument(
        "--family", choices=("gpt", "gpt2"), default="gpt", help="plain torch, or transformers' GPT-2"
    )
    result.add_argument(
        "--path", action="append", default=[], metavar="PATH[:MEMORY][@REFRESH]",
        choices=[
            path + memory
            for path in ("left", "trapezoid", "simpson", "hessian")
            for memory in ("", ":recompute", ":reduced")
            if memory != ":reduced" or path in ("trapezoid", "simpson")
        ]
        + ["left@2", "left@4", "left@8"],
        help="measure this path beside the first order; may be repeated",
    )  # fmt: skip
    result.add_argument("--rounds", type=int, help="timed steps of each arm (20; 5 with --quick)")
    result.add_argument("--warmup", type=int, default=3, help="steps of each arm before them")
    result.add_argument("--accumulate", type=int, default=1, help="micro-batches of one optimizer step (1)")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--device", default="cpu")
    result.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    result.add_argument("--out", type=Path, help="JSON file (results/overhead-FAMILY-DEVICE.json)")
    result.add_argument("--peak-of", nargs=2, metavar=("OPTIMIZER", "ARM"), help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the results."""
    options = parser().parse_args(argv)
    options.rounds = options.rounds or (5 if options.quick else 20)
    if options.rounds < 2:
        parser().error("--rounds must be at least 2: quartiles need several")
    torch.set_num_threads(options.threads)
    sizes = options.size or (QUICK if options.quick else SIZES)
    if options.peak_of:
        print(peak(sizes[0], options))
        return
    kept = keep_freed_memory()
    console = Console()
    console.width = max(console.width, 90)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        console.print(f"measuring {size} on {options.device}, {options.rounds} rounds")
        rows += measure(size, options)
    show(rows, console)
    out = options.out
    if out is None and not options.quick:
        out = RESULTS / f"overhead-{options.family}-{torch.device(options.device).type}.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "rounds": options.rounds, "warmup": options.warmup, "family": options.family,
            "accumulate": options.accumulate, "memory_kept": kept,
        }  # fmt: skip
        document = {"machine": machine(options), "settings": settings, "rows": rows}
        out.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"written to {out}")


if __name__ == "__main__":
    main()
