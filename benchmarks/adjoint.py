"""What snapshots and the adjoint cost: time beside the training that they replay, and bytes beside what was planned.

A GPT is trained with AdamW and clipping for some steps: plainly, and with snapshots; then its adjoint is taken for one
target. On a shorter training the adjoint of one target and of eight together. One round does all of a training's arms,
in an order drawn for it (`rounds`); ratios are taken within a round, and the table gives medians and quartiles. Peak
memory is measured in a process of its own, disk is that of the snapshots' files; both are set against what `assay plan`
says of the same training.

    python benchmarks/adjoint.py            # the sizes of docs/adjoint.md, about eight minutes on two cores
    python benchmarks/adjoint.py --quick    # one small model, nothing written
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pages
import torch
from overhead import (
    GIVES_BACK,
    RESULTS,
    VOCABULARY,
    Size,
    in_own_process,
    lm_loss,
    machine,
    resident_peak,
)
from rich.console import Console
from rich.table import Table
from rounds import in_rounds, summary
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

import assay
from assay import plan
from assay.demo.gpt import GPT, GPTConfig

SIZES = [Size(8, 128, 128, 4), Size(2, 128, 512, 1), Size(16, 16, 16, 1)]
QUICK = [Size(4, 32, 32, 1)]
TARGETS = 8
ARMS = ("plain", "snapshots", "adjoint", "adjoint of 8")
LONG, SHORT = ARMS[:3], (ARMS[0], *ARMS[2:])
REPLAYS = {ARMS[2]: 1, ARMS[3]: TARGETS}


class Problem:
    """A model, its data and its loop."""

    def __init__(self, size: Size, steps: int, device: torch.device) -> None:
        self.size, self.steps, self.device = size, steps, device
        generator = torch.Generator().manual_seed(1)
        shape = (steps, size.batch, size.context + 1)
        self.data = torch.randint(VOCABULARY, shape, generator=generator).to(device)
        self.queries = [
            x[:1] for x in torch.randint(VOCABULARY, (TARGETS, *shape[1:]), generator=generator).to(device)
        ]

    def fresh(self) -> tuple[nn.Module, Optimizer]:
        """The model and its optimizer at the start."""
        torch.manual_seed(0)
        size = self.size
        model = GPT(GPTConfig(VOCABULARY, size.context, size.layers, max(1, size.width // 64), size.width))
        model.to(self.device)
        return model, AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def batches(self, step: int) -> list[tuple[list[int], Tensor]]:
        """The one micro-batch of a step."""
        return [(list(range(self.size.batch)), self.data[step])]

    def train(self, run: assay.Run | None, model: nn.Module, optimizer: Optimizer) -> None:
        """The loop, with a run or without."""
        for step in range(self.steps):
            for ids, batch in self.batches(step):
                if run is None:
                    lm_loss(model, batch).backward()  # type: ignore[no-untyped-call]
                else:
                    with run.step(ids):
                        lm_loss(model, batch).backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def recorded(self, out: str | None) -> tuple[assay.Ledger, nn.Module, Optimizer]:
        """The run with snapshots."""
        model, optimizer = self.fresh()
        with assay.Run(model, optimizer, out=out, snapshots="auto", check="off") as run:
            self.train(run, model, optimizer)
        return run.ledger, model, optimizer


def arm(
    problem: Problem, kind: str, recorded: tuple[assay.Ledger, nn.Module, Optimizer]
) -> Callable[[], None]:
    """What is timed."""
    ledger, model, optimizer = recorded

    def plain() -> None:
        problem.train(None, *problem.fresh())

    def snapshots() -> None:
        with tempfile.TemporaryDirectory() as folder:
            problem.recorded(f"{folder}/run")

    def adjoint() -> None:
        queries = problem.queries if kind == ARMS[3] else problem.queries[:1]
        ledger.adjoint(model, optimizer, problem.batches, lm_loss, queries)

    return {"plain": plain, "snapshots": snapshots}.get(kind, adjoint)


def measure_time(
    problem: Problem, kinds: Sequence[str], options: argparse.Namespace, folder: str
) -> dict[str, list[float]]:
    """Seconds of each round by arm."""
    recorded = problem.recorded(f"{folder}/run")
    arms = {kind: arm(problem, kind, recorded) for kind in kinds}
    return in_rounds(arms, options.rounds, warmup=options.warmup, device=problem.device)


def peak(problem: Problem, kind: str) -> int:
    """Bytes that one arm needs at most beyond what was there before its model."""
    small = Problem(Size(2, 8, 8, 1), 3, problem.device)
    arm(
        small, kind, small.recorded(None)
    )()  # loads what an arm needs of libraries, which is not its own memory
    before = resident_peak(afresh=True)
    if kind == "plain":
        problem.train(None, *problem.fresh())
    else:
        with tempfile.TemporaryDirectory() as folder:
            recorded = problem.recorded(f"{folder}/run")
            if problem.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            else:
                resident_peak(afresh=True)
            arm(problem, kind, recorded)()
    if problem.device.type == "cuda":
        return torch.cuda.max_memory_allocated(problem.device)
    return resident_peak() - before


def measure_memory(problem: Problem, options: argparse.Namespace, kind: str) -> int:
    """`peak` in a process of its own."""
    (found,) = in_own_process(
        __file__, "--peak-of", kind, "--size", problem.size, "--device", options.device,
        "--threads", options.threads, "--steps", options.memory_steps, environment=GIVES_BACK,
    )  # fmt: skip
    return found


def described(problem: Problem, steps: int) -> tuple[plan.Shape, plan.Training]:
    """The training, as `assay plan` sees it."""
    size = problem.size
    shape = plan.shape_of(problem.fresh()[0], (size.layers, size.width))
    tokens = steps * size.batch * size.context
    return shape, plan.Training(tokens, size.context, size.batch, width=4, micro=size.batch)


def planned(problem: Problem, steps: int, targets: int) -> plan.Work:
    """What `assay plan` says of its adjoint."""
    return plan.adjoint(*described(problem, steps), targets)


def over_plain(times: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios within the rounds."""
    plain = times[ARMS[0]]
    return {
        kind: summary([a / b for a, b in zip(taken, plain, strict=True)]) for kind, taken in times.items()
    }


def measure(size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios, and bytes beside the plan."""
    device = torch.device(options.device)
    problem, short = (Problem(size, steps, device) for steps in (options.steps, options.short_steps))
    with tempfile.TemporaryDirectory() as folder:
        times = measure_time(problem, LONG, options, folder)
        disk = sum(p.stat().st_size for p in (Path(folder) / "run" / "snapshots").iterdir())
    with tempfile.TemporaryDirectory() as folder:
        short_times = measure_time(short, SHORT, options, folder)
    trained = plan.training(*described(problem, options.steps))
    eight, one = short_times[ARMS[3]], short_times[ARMS[2]]
    row: dict[str, Any] = {
        "size": size._asdict(),
        "parameters": sum(p.numel() for p in problem.fresh()[0].parameters()),
        "seconds": {kind: summary(taken) for kind, taken in times.items()},
        "short_seconds": {kind: summary(taken) for kind, taken in short_times.items()},
        "ratio": over_plain(times) | {ARMS[3]: over_plain(short_times)[ARMS[3]]},
        "eight_over_one": summary([a / b for a, b in zip(eight, one, strict=True)]),
        "planned_ratio": {
            kind: planned(problem, options.steps, targets).operations / trained.operations
            for kind, targets in REPLAYS.items()
        },
        "disk": {"planned": planned(problem, options.steps, 1).disk, "found": disk},
    }
    if not options.no_memory:
        trainer = (
            4 * 4 * row["parameters"]
        )  # weights, gradients and AdamW's moments, which the replay borrows
        plain = measure_memory(problem, options, ARMS[0])
        row["memory"] = {ARMS[0]: plain} | {
            kind: {
                "planned": trainer + planned(problem, options.memory_steps, targets).memory,
                "found": measure_memory(problem, options, kind),
            }
            for kind, targets in REPLAYS.items()
        }
    return row


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows as a table."""
    table = Table(title="time over that of the training that is replayed: medians (quartiles)", min_width=80)
    for column in ("size", "snapshots", "adjoint", "of 8 targets", "8 over 1", "disk", "memory", "of 8"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            f"{r['median']:.2f} ({r['lower_quartile']:.2f}-{r['upper_quartile']:.2f})"
            for r in (*(row["ratio"][kind] for kind in ARMS[1:]), row["eight_over_one"])
        ]
        memory = row.get("memory", {})
        table.add_row(
            str(Size(**row["size"])),
            *cells,
            f"{row['disk']['found'] / row['disk']['planned']:.2f} of plan",
            *(
                f"{memory[kind]['found'] / memory[kind]['planned']:.2f} of plan" if memory else ""
                for kind in REPLAYS
            ),
        )
    console.print(table)


def figures(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine, settings = document["machine"], document["settings"]
    lines = [
        f"A GPT with AdamW and clipping, {settings['steps']} steps ({settings['short_steps']} for 8 targets and the "
        "one beside them), over the time of the same training without snapshots; medians (quartiles) of "
        f"{settings['rounds']} rounds on {machine['threads']} threads of a CPU, torch {machine['torch']}. The last "
        "size is overhead more than matrix products. In brackets behind disk and memory: over what `assay plan` says.",
        "",
        "| batch × context × width × layers | with snapshots | adjoint, one target | by the plan | 8 targets | "
        "8 over 1 | disk, MB | peak memory, one target, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        ratio, disk = row["ratio"], row["disk"]
        memory = row.get("memory", {}).get(ARMS[2])
        cells = [
            " × ".join(map(str, row["size"].values())),
            pages.spread(ratio[ARMS[1]]),
            pages.spread(ratio[ARMS[2]]),
            f"{row['planned_ratio'][ARMS[2]]:.2f}",
            pages.spread(ratio[ARMS[3]]),
            pages.spread(row["eight_over_one"]),
            *(
                "" if x is None else f"{x['found'] / 1e6:.0f} ({x['found'] / x['planned']:.2f})"
                for x in (disk, memory)
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="adjoint", description=(__doc__ or "").split("\n")[0])
    result.add_argument("--quick", action="store_true", help="one small model; writes only to --out")
    result.add_argument("--size", type=Size.parse, action="append", metavar="BxTxD[xLAYERS]")
    result.add_argument("--steps", type=int, help="of the training (100; 12 with --quick)")
    result.add_argument(
        "--short-steps", type=int, default=12, help="of the training whose adjoint is taken for eight targets"
    )
    result.add_argument(
        "--memory-steps", type=int, default=9, help="of the training whose memory is measured"
    )
    result.add_argument("--rounds", type=int, help="timed rounds (3; 2 with --quick)")
    result.add_argument("--warmup", type=int, default=0)
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--device", default="cpu")
    result.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    result.add_argument("--out", type=Path, help="JSON file (results/adjoint-DEVICE.json)")
    result.add_argument("--peak-of", metavar="ARM", help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the results."""
    options = parser().parse_args(argv)
    options.rounds = options.rounds or (2 if options.quick else 3)
    options.steps = options.steps or (12 if options.quick else 100)
    if options.rounds < 2:
        parser().error("--rounds must be at least 2: quartiles need several")
    torch.set_num_threads(options.threads)
    sizes = options.size or (QUICK if options.quick else SIZES)
    if options.peak_of:
        print(peak(Problem(sizes[0], options.steps, torch.device(options.device)), options.peak_of))
        return
    console = Console()
    console.width = max(console.width, 110)
    rows = []
    for size in sizes:
        console.print(
            f"measuring {size} on {options.device}, {options.rounds} rounds of {options.steps} steps"
        )
        rows.append(measure(size, options))
    show(rows, console)
    out = options.out
    if out is None and not options.quick:
        out = RESULTS / f"adjoint-{torch.device(options.device).type}.json"
    settings = {
        name: getattr(options, name) for name in ("rounds", "warmup", "steps", "short_steps", "memory_steps")
    }
    document = {"machine": machine(options), "settings": settings, "rows": rows}
    pages.keep(document, out, "adjoint", "adjoint", figures)


if __name__ == "__main__":
    main()
