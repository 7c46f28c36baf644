"""What data value embeddings cost: recording beside a plain training step, and the post-pass beside LoGra's logging.

* recording: a step inside `assay.Run` with `DataValueEmbedding(Projection(rank=16))` beside the plain step, SGD and
  AdamW, with the empirical Fisher matrix and with one Gauss-Newton draw; interleaved, ratios within a round; bytes per
  sample;
* post-pass: `ledger.embeddings()` over recordings of growing length, samples per second, beside `Index.build`'s logging
  of the same model, rank and dtype; both in the same rounds. The recorded rows are those of a few steps of that model,
  repeated: what is measured does not depend on their values;
* memory: the peak of the post-pass in a process of its own, over the shortest and the longest recording.

    python benchmarks/embeddings.py            # about six minutes on two cores
    python benchmarks/embeddings.py --quick    # under a minute, nothing written
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import assay
from assay.embedding.recorded import Recorded
from assay.rows import DTYPES, Folder, RowWriter

RESULTS = Path(__file__).parent / "results"
HERE = Path(__file__).parent
RANK = 16


def _sibling(name: str) -> Any:
    """Another script of this folder."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


overhead = _sibling("overhead")


# --- recording ---


def lm_logits_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy by the logits that the model returns."""
    logits = model(tokens[:, :-1])
    loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss


def tokens_of(size: Any, seed: int = 1) -> Tensor:
    """`[batch, context + 1]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(overhead.VOCABULARY, (size.batch, size.context + 1), generator=generator)


def arm(size: Any, optimizer: str, kind: str, folder: Path) -> Callable[[], None]:
    """One training step of that kind, on a model of its own."""
    model, _ = overhead.build(size, "gpt")
    opt, batch = overhead.OPTIMIZERS[optimizer](model), tokens_of(size)

    def plain() -> None:
        lm_logits_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        opt.step()
        opt.zero_grad()

    if kind == "plain":
        return plain
    method = assay.DataValueEmbedding(assay.Projection(rank=RANK), curvature=kind)  # type: ignore[arg-type]
    out = folder / f"{size}-{optimizer}-{kind}"
    run, ids = assay.Run(model, opt, out=out, methods=[method]), list(range(size.batch))

    def recording() -> None:
        with run.step(ids):
            lm_logits_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        opt.step()
        opt.zero_grad()

    recording.run = run  # type: ignore[attr-defined]
    return recording


def measure_recording(size: Any, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of medians and quartiles."""
    device = torch.device("cpu")
    kinds = ("plain", "fisher", "ggn")
    arms = {(o, k): arm(size, o, k, folder) for o in overhead.OPTIMIZERS for k in kinds}
    keys: list[tuple[str, str]] = list(arms)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    for number in range(options.warmup + options.rounds):
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            taken = overhead.seconds(arms[key], device)
            if number >= options.warmup:
                times[key].append(taken)
    rows = []
    for (optimizer, kind), taken in times.items():
        row = {
            "size": size._asdict(),
            "optimizer": optimizer,
            "arm": kind,
            "seconds": overhead.summary(taken),
        }
        ratios = [a / b for a, b in zip(taken, times[optimizer, "plain"], strict=True)]
        row["ratio"] = overhead.summary(ratios)
        run = getattr(arms[optimizer, kind], "run", None)
        row["bytes_per_sample"] = None
        if run is not None:
            run.close()
            row["bytes_per_sample"] = bytes_per_sample(run.ledger)
        rows.append(row)
    return rows


def bytes_per_sample(ledger: assay.Ledger) -> float:
    """On the disk: the numbers of a row, and its share of the tables. A last shard that is not full is left out."""
    assert ledger.path is not None
    folder = ledger.path / "embeddings"
    recorded = Recorded(Folder(folder))
    tables = sum(p.stat().st_size for p in folder.rglob("*.parquet"))
    return recorded.reader.width * DTYPES[recorded.reader.manifest.dtype].itemsize + tables / recorded.length


# --- post-pass ---


def recording_of(size: Any, steps: int, out: Path) -> None:
    """A run folder with so many steps of AdamW, those of a short run repeated."""
    short = out.with_name("short")
    if not short.exists():
        inner = short.with_name("made")
        step = arm(size, "adamw", "fisher", inner)
        for _ in range(8):
            step()
        step.run.close()  # type: ignore[attr-defined]
        shutil.move(inner / f"{size}-adamw-fisher", short)
    shutil.copytree(short, out)
    shutil.rmtree(out / "embeddings" / "rows")
    source = Recorded(Folder(short / "embeddings")).reader
    rows = source.read(0, len(source))
    manifest = source.manifest
    writer = RowWriter(
        Folder(out / "embeddings").below("rows"),
        source.width,
        manifest.dtype,
        manifest.blocks,
        manifest.shard,
    )
    for repetition in range(-(-steps // 8)):
        writer.append(source.table.with_columns(step=pl.col("step") + 8 * repetition), rows)
    writer.close()


def measure_post_pass(size: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Samples per second of the post-pass by length, and of the logging pass in between."""
    lengths: Sequence[int] = options.lengths
    runs = {steps: folder / f"run-{steps}" for steps in lengths}
    for steps, run in runs.items():
        recording_of(size, steps, run)
    model, _ = overhead.build(size, "gpt")
    batches = [(list(range(n * size.batch, (n + 1) * size.batch)), tokens_of(size, n)) for n in range(4)]
    logging: list[float] = []
    post: dict[int, list[float]] = {steps: [] for steps in lengths}
    for _ in range(options.post_rounds):
        started, ended = time.perf_counter(), 0.0

        def progress(done: int) -> None:
            nonlocal ended
            ended = time.perf_counter()

        out = folder / "index"
        assay.Index.build(
            model, batches, lm_logits_loss, out=out, projection=assay.Projection(rank=RANK), check="off",
            progress=progress,
        )  # fmt: skip
        logging.append(len(batches) * size.batch / (ended - started))
        shutil.rmtree(out)
        for steps, run in runs.items():
            for built in run.glob("embeddings/built-*"):
                shutil.rmtree(built)
            started = time.perf_counter()
            found = assay.open(run).embeddings()
            post[steps].append(len(found) / (time.perf_counter() - started))
    longest = post[lengths[-1]]
    ratios = [a / b for a, b in zip(longest, logging, strict=True)]
    return {
        "size": size._asdict(),
        "width": Recorded(Folder(runs[lengths[0]] / "embeddings")).header.width,
        "logging_samples_per_second": overhead.summary(logging),
        "post_pass_samples_per_second": {str(s): overhead.summary(v) for s, v in post.items()},
        "ratio": overhead.summary(ratios),
        "seconds_per_sample_longest_over_shortest": overhead.summary(
            [a / b for a, b in zip(post[lengths[0]], longest, strict=True)]
        ),
        "peak_bytes": {str(steps): peak_of(run) for steps, run in runs.items()},
    }


def peak_of(run: Path) -> int:
    """Peak bytes of the post-pass beyond what the process held before, in a process of its own."""
    for built in run.glob("embeddings/built-*"):
        shutil.rmtree(built)
    command = [sys.executable, __file__, "--peak-of", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the memory of the post-pass could not be measured:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def peak(run: Path) -> int:
    """Bytes that the resident memory grows by."""
    before = overhead.resident_peak(afresh=True)
    assay.open(run).embeddings()
    return int(overhead.resident_peak()) - int(before)


# --- the table ---


def show(document: dict[str, Any], console: Console) -> None:
    """What was measured, as tables."""
    table = Table(title="recording: one training step, ratios to the plain step: medians (quartiles)")
    for column in ("size", "optimizer", "arm", "seconds", "ratio", "bytes per sample"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in document["recording"]:
        r = row["ratio"]
        spread = f"{r['median']:.3f} ({r['lower_quartile']:.2f}-{r['upper_quartile']:.2f})"
        size = "" if row["bytes_per_sample"] is None else f"{row['bytes_per_sample']:.0f}"
        seconds = f"{row['seconds']['median']:.4f}"
        table.add_row(str(overhead.Size(**row["size"])), row["optimizer"], row["arm"], seconds, spread, size)
    console.print(table)
    for row in document["post_pass"]:
        rates = {s: f"{v['median']:.0f}" for s, v in row["post_pass_samples_per_second"].items()}
        peaks = {s: f"{v / 2**20:.0f}" for s, v in row["peak_bytes"].items()}
        console.print(
            f"{overhead.Size(**row['size'])}: logging {row['logging_samples_per_second']['median']:.1f} samples/s, "
            f"post-pass by steps {rates}, ratio {row['ratio']['median']:.1f}, peak MiB {peaks}"
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="embeddings", description=(__doc__ or "").split("\n")[0])
    result.add_argument(
        "--quick", action="store_true", help="a small model, few rounds; writes only to --out"
    )
    result.add_argument("--size", type=overhead.Size.parse, action="append", metavar="BxTxD[xLAYERS]")
    result.add_argument("--only", choices=("recording", "post-pass"), action="append")
    result.add_argument("--rounds", type=int, help="timed steps of each arm (11; 3 with --quick)")
    result.add_argument(
        "--post-rounds", type=int, help="timed post-passes of each length (5; 2 with --quick)"
    )
    result.add_argument("--lengths", type=int, nargs="+", help="steps of the recordings (64 128 256)")
    result.add_argument("--warmup", type=int, default=2)
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--folder", type=Path, help="where runs are written for a while")
    result.add_argument("--out", type=Path, help="JSON file (results/embeddings-cpu.json)")
    result.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the results."""
    options = parser().parse_args(argv)
    options.device = "cpu"
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak(options.peak_of))
        return
    options.rounds = options.rounds or (3 if options.quick else 11)
    options.post_rounds = options.post_rounds or (2 if options.quick else 5)
    options.lengths = options.lengths or ([8, 16] if options.quick else [64, 128, 256])
    sizes = options.size or (overhead.QUICK if options.quick else overhead.SIZES)
    chosen = options.only or ["recording", "post-pass"]
    console = Console()
    console.width = max(console.width, 100)
    started = time.perf_counter()
    document: dict[str, Any] = {
        "machine": overhead.machine(options),
        "rank": RANK,
        "recording": [],
        "post_pass": [],
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for n, size in enumerate(sizes):
            folder = Path(name) / str(n)
            folder.mkdir()
            if "recording" in chosen:
                document["recording"] += measure_recording(size, options, folder)
            if "post-pass" in chosen:
                document["post_pass"].append(measure_post_pass(size, options, folder))
            shutil.rmtree(folder)
    document["seconds"] = round(time.perf_counter() - started)
    show(document, console)
    out = options.out or (None if options.quick or options.only else RESULTS / "embeddings-cpu.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"written to {out}")


if __name__ == "__main__":
    main()
