"""What data value embeddings cost after a run: the post-pass beside LoGra's logging.

* `ledger.embeddings()` over recordings of T, 2T, 4T and 8T steps, seconds and samples per second, beside the logging
  of `Index.build` on the same model, rank and dtype in the same rounds, and the line through the seconds. The recorded
  rows are those of a few steps of that model, repeated: what is measured does not depend on their values;
* segments: the longest recording in as many segments by as many processes as there are threads, beside one segment by
  one process with one thread;
* memory: the peak of the post-pass in a process of its own, by length.

What the recording costs: `benchmarks/recording.py`.

    python benchmarks/embeddings.py            # a few minutes on two cores; JSON and the figures of docs/embeddings.md
    python benchmarks/embeddings.py --quick    # under a minute, nothing written
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import overhead
import pages
import polars as pl
import torch
from recording import Arm, Form, lm_logits_loss, tokens_of
from rich.console import Console
from rounds import summary

import assay
from assay.embedding.recorded import Recorded
from assay.rows import Folder, RowWriter

RANK = 16  # of the post-pass
SLOW = 1e-7  # learning rate of the recording that is repeated: the product of I − K H stays finite over any length


SIZES = [overhead.Size(16, 256, 384, 2)]


# --- post-pass ---


def recording_of(size: Any, steps: int, out: Path) -> None:
    """A run folder with so many steps of AdamW, those of a short run repeated."""
    short = out.with_name("short")
    if not short.exists():
        inner = short.with_name("made")
        step = Arm(size, "adamw", Form("fisher", RANK), inner, lr=SLOW)
        for _ in range(8):
            step()
        assert step.run is not None
        step.run.close()
        shutil.move(inner, short)
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
    seconds: dict[int, list[float]] = {steps: [] for steps in lengths}
    for _ in range(options.rounds):
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
            seconds[steps].append(time.perf_counter() - started)
            post[steps].append(len(found) / seconds[steps][-1])
    longest = post[lengths[-1]]
    ratios = [a / b for a, b in zip(longest, logging, strict=True)]
    middle = {steps: statistics.median(values) for steps, values in seconds.items()}
    return {
        "size": size._asdict(),
        "width": Recorded(Folder(runs[lengths[0]] / "embeddings")).header.width,
        "logging_samples_per_second": summary(logging),
        "post_pass_samples_per_second": {str(s): summary(v) for s, v in post.items()},
        "ratio": summary(ratios),
        "seconds": {str(s): summary(v) for s, v in seconds.items()},
        "line": line(middle),
        "segments": segments_of(runs[lengths[-1]], options),
        "peak_bytes": {str(steps): peak_of(run) for steps, run in runs.items()},
    }


def line(seconds: Mapping[int, float]) -> dict[str, float]:
    """Least squares: `seconds = offset + per_step · steps`, and the share of their variance that it explains."""
    slope, offset = statistics.linear_regression(list(seconds), list(seconds.values()))
    return {
        "offset_seconds": offset,
        "seconds_per_step": slope,
        "r_squared": statistics.correlation(list(seconds), list(seconds.values())) ** 2,
    }


def segments_of(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a build on one thread by one process, and in segments by several at once."""
    taken: dict[int, list[float]] = {1: [], max(2, options.threads): []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(3):
        for workers, values in taken.items():
            for built in run.glob("embeddings/built-*"):
                shutil.rmtree(built)
            started = time.perf_counter()
            assay.open(run).embeddings(segments=workers, workers=workers)
            values.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return {str(workers): summary(values) for workers, values in taken.items()}


def peak_of(run: Path) -> int:
    """Peak bytes of the post-pass beyond what the process held before, in a process of its own."""
    for built in run.glob("embeddings/built-*"):
        shutil.rmtree(built)
    (found,) = overhead.in_own_process(__file__, "--peak-of", run)
    return found


def peak(run: Path) -> int:
    """Bytes that the resident memory grows by."""
    before = overhead.resident_peak(afresh=True)
    assay.open(run).embeddings()
    return int(overhead.resident_peak()) - int(before)


# --- the table ---


def show(document: dict[str, Any], console: Console) -> None:
    """What was measured, as tables."""
    for row in document["post_pass"]:
        rates = {s: f"{v['median']:.0f}" for s, v in row["post_pass_samples_per_second"].items()}
        peaks = {s: f"{v / 2**20:.0f}" for s, v in row["peak_bytes"].items()}
        console.print(
            f"{overhead.Size(**row['size'])}: logging {row['logging_samples_per_second']['median']:.1f} samples/s, "
            f"post-pass by steps {rates}, ratio {row['ratio']['median']:.1f}, peak MiB {peaks}, line {row['line']}, "
            f"segments {row['segments']}"
        )


def figures(document: dict[str, Any]) -> str:
    """What `docs/embeddings.md` shows of the results."""
    machine, lines = document["machine"], []
    for row in document["post_pass"]:
        size, line = " × ".join(map(str, row["size"].values())), row["line"]
        seconds = ", ".join(f"{s}: {v['median']:.2f}" for s, v in row["seconds"].items())
        peaks = ", ".join(f"{v / 2**20:.0f}" for v in row["peak_bytes"].values())
        apart = ", ".join(f"{n}: {v['median']:.2f}" for n, v in row["segments"].items())
        longest = list(row["post_pass_samples_per_second"].values())[-1]["median"]
        lines.append(
            f"\nThe post-pass over a recording of {size} (AdamW, rank {document['rank']}, {row['width']} numbers per "
            f"vector) goes through {longest:.0f} samples per second, {row['ratio']['median']:.0f} times as many as "
            f"`Index.build` logs of the same model. Seconds by steps: {seconds}; the line through them has "
            f"{1e3 * line['seconds_per_step']:.2f} ms per step and explains {100 * line['r_squared']:.2f} % of their "
            f"variance. Peak memory beyond what the process held before, in MiB by the same lengths: {peaks}. "
            f"Seconds for the longest by number of processes, each with one thread and a segment: {apart}."
        )
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    lines.append(f"\n`python benchmarks/embeddings.py` · medians of {document['rounds']} rounds · {where}.")
    return "\n".join(lines).lstrip() + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="embeddings", description=(__doc__ or "").split("\n")[0])
    result.add_argument(
        "--quick", action="store_true", help="a small model, few rounds; writes only to --out"
    )
    result.add_argument("--size", type=overhead.Size.parse, action="append", metavar="BxTxD[xLAYERS]")
    result.add_argument("--rounds", type=int, help="timed post-passes of each length (5; 2 with --quick)")
    result.add_argument("--lengths", type=int, nargs="+", help="steps of the recordings (64 128 256 512)")
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
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.lengths = options.lengths or ([8, 16] if options.quick else [64, 128, 256, 512])
    sizes = options.size or (overhead.QUICK if options.quick else SIZES)
    console = Console()
    console.width = max(console.width, 100)
    started = time.perf_counter()
    document: dict[str, Any] = {
        "machine": overhead.machine(options),
        "rank": RANK,
        "rounds": options.rounds,
        "post_pass": [],
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for n, size in enumerate(sizes):
            folder = Path(name) / str(n)
            folder.mkdir()
            document["post_pass"].append(measure_post_pass(size, options, folder))
            shutil.rmtree(folder)
    document["seconds"] = round(time.perf_counter() - started)
    show(document, console)
    out = options.out or (None if options.quick else overhead.RESULTS / "embeddings-cpu.json")
    pages.keep(document, out, "embeddings", "embeddings", figures)


if __name__ == "__main__":
    main()
