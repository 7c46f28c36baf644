"""What data value embeddings cost: recording beside a plain training step, and the post-pass beside LoGra's logging.

* recording: a step inside `assay.Run` with `DataValueEmbedding` beside the plain step, SGD and AdamW: the empirical
  Fisher matrix at ranks 16 and 64, and one Gauss-Newton draw at rank 16; one step of each per round in an order that
  rotates, ratios within a round; bytes per sample on the disk;
* post-pass: `ledger.embeddings()` over recordings of T, 2T, 4T and 8T steps, seconds and samples per second, beside
  `Index.build`'s logging of the same model, rank and dtype in the same rounds, and the line through the seconds. The
  recorded rows are those of a few steps of that model, repeated: what is measured does not depend on their values;
* segments: the longest recording in as many segments by as many processes as there are threads, beside one segment by
  one process with one thread;
* memory: the peak of the post-pass in a process of its own, by length.

    python benchmarks/embeddings.py            # under six minutes on two cores
    python benchmarks/embeddings.py --quick    # under a minute, nothing written
    python benchmarks/embeddings.py --docs     # writes the table in docs/embeddings.md from the results
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
DOCS = HERE.parent / "docs" / "embeddings.md"
RANK = 16  # of the post-pass
SLOW = 1e-7  # learning rate of the recording that is repeated: the product of I − K H stays finite over any length
FORMS = (("fisher", 16), ("fisher", 64), ("ggn", 16))  # curvature and rank of the recordings


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
SIZES = [overhead.Size(16, 256, 384, 2)]


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


def arm(
    size: Any, optimizer: str, kind: str, folder: Path, rank: int = RANK, lr: float | None = None
) -> Callable[[], None]:
    """One training step of that kind ("plain", or the curvature that is recorded), on a model of its own."""
    model, _ = overhead.build(size, "gpt")
    opt, batch = overhead.OPTIMIZERS[optimizer](model), tokens_of(size)
    for group in opt.param_groups:
        group["lr"] = group["lr"] if lr is None else lr

    def plain() -> None:
        lm_logits_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        opt.step()
        opt.zero_grad()

    if kind == "plain":
        return plain
    method = assay.DataValueEmbedding(assay.Projection(rank=rank), curvature=kind)  # type: ignore[arg-type]
    out = folder / f"{size}-{optimizer}-{kind}-{rank}"
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
    kinds = (("plain", 0), *FORMS)
    arms = {(o, *form): arm(size, o, form[0], folder, form[1]) for o in overhead.OPTIMIZERS for form in kinds}
    keys: list[tuple[str, str, int]] = list(arms)
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in keys}
    for number in range(options.warmup + options.rounds):
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            taken = overhead.seconds(arms[key], device)
            if number >= options.warmup:
                times[key].append(taken)
    rows = []
    for (optimizer, kind, rank), taken in times.items():
        row: dict[str, Any] = {
            "size": size._asdict(),
            "optimizer": optimizer,
            "arm": kind,
            "rank": rank,
            "seconds": overhead.summary(taken),
        }
        ratios = [a / b for a, b in zip(taken, times[optimizer, "plain", 0], strict=True)]
        row["ratio"] = overhead.summary(ratios)
        run = getattr(arms[optimizer, kind, rank], "run", None)
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
        step = arm(size, "adamw", "fisher", inner, lr=SLOW)
        for _ in range(8):
            step()
        step.run.close()  # type: ignore[attr-defined]
        shutil.move(inner / f"{size}-adamw-fisher-{RANK}", short)
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
            seconds[steps].append(time.perf_counter() - started)
            post[steps].append(len(found) / seconds[steps][-1])
    longest = post[lengths[-1]]
    ratios = [a / b for a, b in zip(longest, logging, strict=True)]
    middle = {steps: statistics.median(values) for steps, values in seconds.items()}
    return {
        "size": size._asdict(),
        "width": Recorded(Folder(runs[lengths[0]] / "embeddings")).header.width,
        "logging_samples_per_second": overhead.summary(logging),
        "post_pass_samples_per_second": {str(s): overhead.summary(v) for s, v in post.items()},
        "ratio": overhead.summary(ratios),
        "seconds": {str(s): overhead.summary(v) for s, v in seconds.items()},
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
    return {str(workers): overhead.summary(values) for workers, values in taken.items()}


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
    for column in ("size", "optimizer", "arm", "rank", "seconds", "ratio", "bytes per sample"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in document["recording"]:
        r = row["ratio"]
        spread = f"{r['median']:.3f} ({r['lower_quartile']:.2f}-{r['upper_quartile']:.2f})"
        size = "" if row["bytes_per_sample"] is None else f"{row['bytes_per_sample']:.0f}"
        seconds = f"{row['seconds']['median']:.4f}"
        named = (str(overhead.Size(**row["size"])), row["optimizer"], row["arm"], str(row["rank"] or ""))
        table.add_row(*named, seconds, spread, size)
    console.print(table)
    for row in document["post_pass"]:
        rates = {s: f"{v['median']:.0f}" for s, v in row["post_pass_samples_per_second"].items()}
        peaks = {s: f"{v / 2**20:.0f}" for s, v in row["peak_bytes"].items()}
        console.print(
            f"{overhead.Size(**row['size'])}: logging {row['logging_samples_per_second']['median']:.1f} samples/s, "
            f"post-pass by steps {rates}, ratio {row['ratio']['median']:.1f}, peak MiB {peaks}, line {row['line']}, "
            f"segments {row['segments']}"
        )


MARKS = ("<!-- figures of benchmarks/embeddings.py -->\n", "<!-- until here -->\n")


def figures(document: dict[str, Any]) -> str:
    """What `docs/embeddings.md` shows of the results."""
    machine, lines = document["machine"], []
    lines += [
        f"On {machine['threads']} cores of one {machine['cpu']} (torch {machine['torch'].split('+')[0]}), "
        f"medians and quartiles of {document['rounds']} rounds; `python benchmarks/embeddings.py`.\n",
        "| batch × context × width × layers | optimizer | recorded | rank | step over plain step | bytes per sample |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["recording"]:
        if row["arm"] != "plain":
            size, r = " × ".join(map(str, row["size"].values())), row["ratio"]
            spread = f"{r['median']:.2f} ({r['lower_quartile']:.2f}–{r['upper_quartile']:.2f})"
            cells = (
                size,
                row["optimizer"],
                row["arm"],
                str(row["rank"]),
                spread,
                f"{row['bytes_per_sample']:.0f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
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
    return "\n".join(lines) + "\n"


def page() -> str:
    """`docs/embeddings.md` with the figures of the committed results; without any where there are none."""
    results = RESULTS / "embeddings-cpu.json"
    shown = figures(json.loads(results.read_text(encoding="utf-8"))) if results.exists() else ""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + shown + MARKS[1] + after


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
    result.add_argument("--lengths", type=int, nargs="+", help="steps of the recordings (64 128 256 512)")
    result.add_argument("--docs", action="store_true", help="only write docs/embeddings.md from the results")
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
    if options.docs:
        DOCS.write_text(page(), encoding="utf-8")
        return
    options.rounds = options.rounds or (3 if options.quick else 11)
    options.post_rounds = options.post_rounds or (2 if options.quick else 5)
    options.lengths = options.lengths or ([8, 16] if options.quick else [64, 128, 256, 512])
    sizes = options.size or (overhead.QUICK if options.quick else SIZES)
    chosen = options.only or ["recording", "post-pass"]
    console = Console()
    console.width = max(console.width, 100)
    started = time.perf_counter()
    document: dict[str, Any] = {
        "machine": overhead.machine(options),
        "rank": RANK,
        "rounds": options.rounds,
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
        if out.parent == RESULTS:
            DOCS.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
