"""What recording for data value embeddings adds to a training step, by rank and support, and takes of the disk.

One training step inside `assay.Run` with `DataValueEmbedding`, written to the disk, beside the plain step, for SGD and
AdamW; one step of each per round in an order drawn for it (`rounds`); ratios within a round, medians and quartiles.

    python benchmarks/recording.py            # about five minutes on two cores; writes JSON and docs/embeddings.md
    python benchmarks/recording.py --quick    # seconds, nothing written
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import overhead
import pages
import performance
import torch
from rounds import summary
from torch import Tensor, nn

import assay
from assay.embedding.recorded import Recorded
from assay.rows import DTYPES, Folder


class Form(NamedTuple):
    """What is recorded."""

    curvature: Literal["fisher", "ggn"]
    rank: int
    support: int | None = None

    @property
    def name(self) -> str:
        """Of its arm."""
        return f"{self.curvature} {self.rank}" + (f":{self.support}" if self.support else "")


FORMS = [
    Form("fisher", 16), Form("fisher", 16, 128), Form("fisher", 16, 64), Form("fisher", 16, 32), Form("fisher", 64),
    Form("fisher", 64, 128), Form("ggn", 16), Form("ggn", 16, 64),
]  # fmt: skip


def lm_logits_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy by the logits that the model returns."""
    logits = model(tokens[:, :-1])
    loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss


def tokens_of(size: overhead.Size, seed: int = 1) -> Tensor:
    """`[batch, context + 1]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(overhead.VOCABULARY, (size.batch, size.context + 1), generator=generator)


class Arm:
    """One training step of a model of its own; called, it is taken.

    Args:
        size: of the model and its batch.
        optimizer: a name of `overhead.OPTIMIZERS`.
        form: what is recorded; None for the plain step.
        out: the run's folder.
        lr: learning rate, if another than the optimizer's.
    """

    def __init__(
        self,
        size: overhead.Size,
        optimizer: str,
        form: Form | None = None,
        out: Path | None = None,
        lr: float | None = None,
    ) -> None:
        self.model, _ = overhead.build(size, "gpt")
        self.optimizer, self.batch = overhead.OPTIMIZERS[optimizer](self.model), tokens_of(size)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        self.run: assay.Run | None = None
        if form is not None:
            projection = assay.Projection(rank=form.rank, support=form.support)
            method = assay.DataValueEmbedding(projection, curvature=form.curvature)
            self.run = assay.Run(self.model, self.optimizer, out=out, methods=[method], check="off")

    def __call__(self) -> None:
        """Take it."""
        if self.run is None:
            lm_logits_loss(self.model, self.batch).backward()  # type: ignore[no-untyped-call]
        else:
            with self.run.step(range(len(self.batch))):
                lm_logits_loss(self.model, self.batch).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()


def bytes_per_sample(folder: Path) -> float:
    """On the disk: the numbers of a row, and its share of the tables. A last shard that is not full is left out."""
    recorded = Recorded(Folder(folder / "embeddings"))
    tables = sum(p.stat().st_size for p in (folder / "embeddings").rglob("*.parquet"))
    return recorded.reader.width * DTYPES[recorded.reader.manifest.dtype].itemsize + tables / recorded.length


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per optimizer and form."""
    size: overhead.Size = performance.QUICK if options.quick else performance.MAIN
    found = []
    for optimizer in overhead.OPTIMIZERS:
        places = {form: folder / f"{optimizer}-{form.name.replace(':', '-')}" for form in FORMS}
        recording: dict[str, Callable[[], None]] = {
            form.name: Arm(size, optimizer, form, out) for form, out in places.items()
        }
        arms = {"plain": Arm(size, optimizer), **recording}
        taken = performance.timed(arms, options, options.seconds / len(overhead.OPTIMIZERS))
        for form, out in places.items():
            arms[form.name].run.close()  # type: ignore[attr-defined]
            own = taken[form.name]
            ratios = [a / b for a, b in zip(own, taken["plain"], strict=True)]
            row = {
                "size": size._asdict(), "optimizer": optimizer, **form._asdict(), "rounds": len(own),
                "seconds": summary(own), "ratio": summary(ratios),
                "quickest": min(own) / min(taken["plain"]), "bytes_per_sample": bytes_per_sample(out),
            }  # fmt: skip
            found.append(row)
            print(optimizer, form.name, pages.spread(row["ratio"]), f"{row['quickest']:.3f}", flush=True)
    return found


def figures(document: dict[str, Any]) -> str:
    """The table, and where it was measured."""
    rows, machine = document["rows"], document["machine"]
    found = {(row["optimizer"], Form(row["curvature"], row["rank"], row["support"])): row for row in rows}
    lines = [
        "| curvature | rank | support | SGD: step over the plain step | bytes per sample | AdamW | bytes per sample |",
        "|---|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        cells = [form.curvature, str(form.rank), str(form.support or "whole sides")]
        for optimizer in overhead.OPTIMIZERS:
            row = found[optimizer, form]
            cells += [
                f"{pages.spread(row['ratio'])}; quickest {row['quickest']:.2f}",
                f"{row['bytes_per_sample']:,.0f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    size = "B {batch}, T {context}, d {width}, {layers} layers".format(**rows[0]["size"])
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    return (
        f"Recording on a GPT of {size}, random projections; medians of {rows[0]['rounds']} rounds (quartiles), and the "
        f"quickest step over the quickest plain one; `python benchmarks/recording.py` · {where}.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(prog="recording", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny size; writes only to --out")
    parser.add_argument("--seconds", type=float, default=270.0, help="about how long to measure")
    parser.add_argument("--rounds", type=int, default=40, help="of each arm at most")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file (results/recording-cpu.json)")
    options = parser.parse_args(argv)
    options.device = "cpu"
    torch.set_num_threads(options.threads)
    if options.quick:
        options.seconds, options.rounds = min(options.seconds, 2.0), min(options.rounds, 3)
    with tempfile.TemporaryDirectory() as folder:
        document = {"machine": overhead.machine(options), "rows": measure(options, Path(folder))}
    print(figures(document))
    out = options.out or (None if options.quick else overhead.RESULTS / "recording-cpu.json")
    pages.keep(document, out, "recording", "embeddings", figures)


if __name__ == "__main__":
    main()
