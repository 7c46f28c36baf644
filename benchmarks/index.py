"""What an influence index costs: logging beside training, queries beside the bare work, memory, a million rows.

* logging: rows of rank 64 into a store on disk, beside a plain forward and backward pass of the same batch, examples
  per second of both, interleaved; a GPT and a small convolutional network;
* query: `search` over stored rows, beside reading the same bytes with one `read` per shard, widening them and one GEMM
  with the same directions;
* memory: the peak of a search in a process of its own, over N, 10 N and 100 N rows, with pieces and shards of 1 MiB, so
  that N rows are several of them (with the default of 32 MiB they would be a part of one); and the bytes of the ids;
* million: 64 queries over 2^20 rows of dimension 4,096.

Rows of the last three are drawn, not logged: what is measured does not depend on their values. The machine's cache of
files is warm where they fit; the table says how many bytes that is.

    python benchmarks/index.py            # about six minutes on two idle cores, 4 GiB of disk for a while
    python benchmarks/index.py --quick    # half a minute, nothing written
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import overhead
import pages
import polars as pl
import torch
from rich.console import Console
from rich.table import Table
from rounds import Step, in_rounds, seconds, summary
from torch import Tensor, nn
from torch.nn import functional as F

from assay.demo.gpt import GPT, GPTConfig
from assay.index.scores import best_rows
from assay.rows import Folder, RowDtype, RowReader, RowWriter, reader

RESULTS = Path(__file__).parent / "results"
RANK, QUERIES, K = 64, 64, 10
PIECE = 1 << 20  # bytes of the pieces in the comparison of memory


# --- logging ---


class CNN(nn.Module):
    """Three convolutions and a head, for images of 32 x 32."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 10]` of `[B, 3, 32, 32]`."""
        logits: Tensor = self.head(self.body(x).flatten(1))
        return logits


def gpt_case(quick: bool) -> tuple[nn.Module, Callable[[Any, Any], Tensor], list[Any], int]:
    """A GPT of 4 layers, and batches of tokens."""
    batch, context, width = (4, 64, 64) if quick else (16, 256, 384)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocabulary=512, context=context, layers=4, heads=max(1, width // 64), width=width))
    tokens = [torch.randint(512, (batch, context + 1)) for _ in range(2)]
    return model, overhead.lm_loss, tokens, batch


def cnn_case(quick: bool) -> tuple[nn.Module, Callable[[Any, Any], Tensor], list[Any], int]:
    """A small convolutional network, and batches of images."""
    batch = 8 if quick else 64
    torch.manual_seed(0)
    images = [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))) for _ in range(2)]
    return CNN(8 if quick else 32), lambda m, b: F.cross_entropy(m(b[0]), b[1]), images, batch


def measure_logging(
    name: str, case: Callable[[bool], Any], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Seconds of each round: a few batches logged into an open store, and the same trained without an update."""
    model, loss_fn, batches, size = case(options.quick)
    logger = _Logger(model, loss_fn, folder / name)
    arms: dict[str, Step] = {
        "plain": lambda: _passes(model, loss_fn, batches),
        "logging": lambda: logger.log(batches, size),
    }
    rounds = in_rounds(arms, options.rounds, warmup=2)
    logger.close()
    count = size * len(batches)
    curvature = seconds(logger.curvature)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": size,
        "rank": RANK,
        "row_bytes": logger.width * 2,
        "examples_per_second": {arm: summary([count / t for t in times]) for arm, times in rounds.items()},
        "throughput": summary([p / t for p, t in zip(rounds["plain"], rounds["logging"], strict=True)]),
        "curvature_seconds_per_example": curvature / (count * (options.rounds + 2)),
    }


class _Logger:
    """`Index.build` that is fed round by round: the build runs in a thread of its own and waits for batches."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], out: Path) -> None:
        from assay.capture import Weights
        from assay.projection import Projection, Projector, random_sides
        from assay.rows import Background

        named = list(model.named_parameters())
        weights = Weights(named, {p: 0 for _, p in named}, model.buffers())
        sides = {n: random_sides(n, p, Projection(rank=RANK)) for n, p in named}
        self.projector = Projector(weights, sides)
        self.width = self.projector.width
        self.model, self.loss_fn, self.folder = model, loss_fn, Folder(out)
        blocks = [(layer.start, layer.stop) for layer in self.projector.layers]
        self.writer = RowWriter(self.folder.below("rows"), self.width, "bf16", blocks)
        self.background = Background(self.writer.append).__enter__()
        self.done = 0

    def log(self, batches: Sequence[Any], size: int) -> None:
        """What the build does with each batch."""
        for batch in batches:
            rows = self.projector.rows(self.model, self.loss_fn, batch, size, "mean")
            norms = rows.double().norm(dim=1).numpy()
            ids = range(self.done, self.done + size)
            self.background.put(pl.DataFrame({"id": list(ids), "norm": norms}), rows)
            self.done += size

    def close(self) -> None:
        """Wait for the writer."""
        self.background.__exit__(None, None, None)
        self.writer.close()

    def curvature(self) -> None:
        """The Fisher matrices, which a build forms from the rows at its end."""
        squares = 0.0
        for _, piece in RowReader(self.folder.below("rows")).pieces():
            for layer in self.projector.layers:
                part = piece[:, layer.columns]
                if layer.width <= 8192:
                    squares += float((part.t() @ part).trace())


def _passes(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batches: Sequence[Any]) -> None:
    for batch in batches:
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)


# --- queries ---


def write_rows(folder: Path, count: int, width: int, dtype: RowDtype, size: int | None = None) -> float:
    """Fill a store with drawn rows, in shards of so many; seconds."""
    writer = RowWriter(Folder(folder), width, dtype, shard=size)
    shard = writer.manifest.shard
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(shard, width, generator=generator)
    started = time.perf_counter()
    for start in range(0, count, shard):
        n = min(shard, count - start)
        rows = some[:n].roll(start // shard, 0)  # the values do not matter, that they differ does
        writer.append(pl.DataFrame({"id": range(start, start + n)}), rows)
    writer.close()
    return time.perf_counter() - started


def search(folder: Path, directions: Tensor) -> tuple[Tensor, Tensor]:
    """What `Index.search` does once it has the directions."""
    return best_rows(RowReader(Folder(folder)), directions, K)


def bare(folder: Path, directions: Tensor, dtype: torch.dtype) -> None:
    """The same bytes with one read per file, widened, and one GEMM; no checksums, no ids, no ranking."""
    width = directions.shape[1]
    size = width * dtype.itemsize
    turned = directions.t().contiguous()
    buffer = wide = None
    for file in shards(folder):
        rows = file.stat().st_size // size  # what is behind the last whole row are checksums
        if buffer is None or len(buffer) < rows * size:
            buffer = bytearray(rows * size)
            wide = torch.empty(rows, width)
        assert wide is not None
        with file.open("rb", buffering=0) as stream:
            stream.readinto(memoryview(buffer)[: rows * size])
        stored = torch.frombuffer(buffer, dtype=dtype, count=rows * width).view(rows, width)
        wide[:rows].copy_(stored)
        wide[:rows] @ turned


def shards(folder: Path) -> Iterator[Path]:
    """The files that hold the rows, in order."""
    yield from sorted((folder / "data" / "c").glob("*/0"), key=lambda path: int(path.parent.name))


def measure_queries(options: argparse.Namespace, folder: Path, dtype: RowDtype) -> dict[str, Any]:
    """Pairs per second of a search and of the bare work, interleaved."""
    count, width = (4096, 512) if options.quick else (65536, 4096)
    place = folder / f"query-{dtype}"
    write_rows(place, count, width, dtype)
    directions = torch.randn(QUERIES, width)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}[
        dtype
    ]
    arms: dict[str, Step] = {
        "search": lambda: search(place, directions),
        "bare": lambda: bare(place, directions, torch_dtype),
    }
    times = in_rounds(arms, options.rounds, warmup=1)
    size = sum(file.stat().st_size for file in shards(place))
    shutil.rmtree(place)
    pairs = count * QUERIES
    return {
        "rows": count, "width": width, "dtype": dtype, "bytes": size, "queries": QUERIES,
        "pairs_per_second": {arm: summary([pairs / t for t in taken]) for arm, taken in times.items()},
        "throughput": summary([b / s for b, s in zip(times["bare"], times["search"], strict=True)]),
    }  # fmt: skip


def measure_memory(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peak of a search in a process of its own, for N, 10 N and 100 N rows."""
    few, width = (4096, 64) if options.quick else (2048, 1024)
    found = []
    for count in (few, 10 * few, 100 * few):
        place = folder / f"memory-{count}"
        write_rows(place, count, width, "bf16", PIECE // (2 * width))
        found.append(
            {"rows": count, "width": width, "bytes": 2 * count * width, **peak_apart(place, PIECE, options)}
        )
        shutil.rmtree(place)
    return found


def peak_apart(place: Path, piece: int | None, options: argparse.Namespace) -> dict[str, int]:
    """`peak` in a process of its own."""
    pieces = ["--piece", piece] if piece else []
    found = overhead.in_own_process(__file__, "--peak-of", place, "--threads", options.threads, *pieces)
    return dict(zip(("peak_bytes", "id_bytes"), found, strict=True))


def peak(folder: Path, piece: int | None) -> tuple[int, int]:
    """Bytes that a search needs at most, beyond what was resident before; and those of the ids among them."""
    if piece:
        reader.PIECE_BYTES = piece
    directions = torch.randn(QUERIES, json.loads((folder / "manifest.json").read_text())["width"])
    before = overhead.resident_peak(afresh=True)
    rows = RowReader(Folder(folder))
    best_rows(rows, directions, K)
    return int(overhead.resident_peak() - before), int(rows.table.estimated_size())


def measure_million(options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """64 queries over 2^20 rows of 4,096 entries."""
    count, width = (1 << 13, 512) if options.quick else (1 << 20, 4096)
    dtype: RowDtype = options.dtype
    needed = count * width * (1 if dtype == "int8" else 2)
    if shutil.disk_usage(folder).free < 1.5 * needed:
        print(f"a million rows are left out: they take {needed / 2**30:.0f} GiB of disk")
        return None
    place = folder / "million"
    written = write_rows(place, count, width, dtype)
    directions = torch.randn(QUERIES, width)
    times = [seconds(lambda: search(place, directions)) for _ in range(2 if options.quick else 3)]
    memory = peak_apart(place, None, options)
    shutil.rmtree(place)
    return {
        "rows": count, "width": width, "dtype": dtype, "bytes": needed, "queries": QUERIES, "k": K,
        "write_seconds": written, "seconds": summary(times),
        "pairs_per_second": summary([count * QUERIES / t for t in times]), **memory,
    }  # fmt: skip


# --- the command ---


def show(document: dict[str, Any], console: Console) -> None:
    """The results as tables."""
    table = Table(title="logging at rank 64, share of a plain pass's throughput: median (quartiles)")
    for column in ("model", "plain, 1/s", "logging, 1/s", "share", "KB per row"):
        table.add_column(column, justify="right")
    for row in document["logging"]:
        speed = row["examples_per_second"]
        table.add_row(
            row["model"], f"{speed['plain']['median']:.1f}", f"{speed['logging']['median']:.1f}",
            pages.spread(row["throughput"]), f"{row['row_bytes'] / 1e3:.0f}",
        )  # fmt: skip
    console.print(table)
    table = Table(title="queries, share of the bare read and GEMM: median (quartiles)")
    for column in ("rows", "stored as", "MB", "search, pairs/s", "bare, pairs/s", "share"):
        table.add_column(column, justify="right")
    for row in document["queries"]:
        speed = row["pairs_per_second"]
        table.add_row(
            f"{row['rows']} x {row['width']}", row["dtype"], f"{row['bytes'] / 1e6:.0f}",
            f"{speed['search']['median']:,.0f}", f"{speed['bare']['median']:,.0f}", pages.spread(row["throughput"]),
        )  # fmt: skip
    console.print(table)
    for row in document["memory"]:
        console.print(
            f"peak of a search over {row['rows']} rows ({row['bytes'] / 2**20:.0f} MiB), pieces of 1 MiB: "
            f"{row['peak_bytes'] / 2**20:.1f} MiB, of them ids {row['id_bytes'] / 2**20:.1f} MiB"
        )
    million = document["million"]
    if million:
        console.print(
            f"{million['queries']} queries over {million['rows']} x {million['width']} {million['dtype']}: "
            f"{million['seconds']['median']:.1f} s, {million['pairs_per_second']['median']:,.0f} pairs/s; written in "
            f"{million['write_seconds']:.0f} s; peak {million['peak_bytes'] / 2**20:.0f} MiB with pieces of 32 MiB"
        )


def figures(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = document["machine"]
    lines = [
        f"Measured on {machine['threads']} threads of a CPU, torch {machine['torch']}; medians (quartiles).",
        "",
    ]
    lines += [
        "| logging at rank 64 | plain pass, examples/s | logging, examples/s | share |",
        "|---|---|---|---|",
    ]
    for row in document["logging"]:
        speed = row["examples_per_second"]
        lines.append(
            f"| {row['model']} | {speed['plain']['median']:.1f} | {speed['logging']['median']:.1f} | "
            f"{pages.spread(row['throughput'])} |"
        )
    lines += ["", "| rows stored as | MB | search, pairs/s | bare read and product, pairs/s | share |"]
    lines += ["|---|---|---|---|---|"]
    for row in document["queries"]:
        speed = row["pairs_per_second"]
        lines.append(
            f"| {row['dtype']}, {row['rows']:,} × {row['width']:,} | {row['bytes'] / 1e6:.0f} | "
            f"{speed['search']['median']:,.0f} | {speed['bare']['median']:,.0f} | {pages.spread(row['throughput'])} |"
        )
    lines += [
        "",
        "| rows, pieces of 1 MiB | MiB stored | peak of a search, MiB | of these, ids |",
        "|---|---|---|---|",
    ]
    for row in document["memory"]:
        lines.append(
            f"| {row['rows']:,} | {row['bytes'] / 2**20:.0f} | {row['peak_bytes'] / 2**20:.1f} | "
            f"{row['id_bytes'] / 2**20:.1f} |"
        )
    row = document["million"]
    if row:
        lines += [
            "",
            f"{row['queries']} queries over {row['rows']:,} rows of {row['width']:,} numbers ({row['dtype']}, "
            f"{row['bytes'] / 2**30:.1f} GiB): {row['seconds']['median']:.1f} s, "
            f"{row['pairs_per_second']['median']:,.0f} pairs/s, {row['peak_bytes'] / 2**20:.0f} MiB at most.",
        ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="index", description=(__doc__ or "").split("\n")[0])
    result.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds; writes only to --out"
    )
    result.add_argument("--only", choices=("logging", "queries", "memory", "million"), action="append")
    result.add_argument("--rounds", type=int, help="timed rounds of each arm (9; 3 with --quick)")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument(
        "--dtype", choices=("fp16", "bf16", "int8"), default="int8", help="of the million rows"
    )
    result.add_argument(
        "--folder", type=Path, help="where rows are written for a while (the system's temporary one)"
    )
    result.add_argument("--out", type=Path, help="JSON file (results/index-cpu.json)")
    result.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    result.add_argument("--piece", type=int, help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the results."""
    options = parser().parse_args(argv)
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.device = "cpu"
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(*peak(options.peak_of, options.piece))
        return
    chosen = options.only or ["logging", "queries", "memory", "million"]
    console = Console()
    console.width = max(console.width, 100)
    started = time.perf_counter()
    document: dict[str, Any] = {
        "machine": overhead.machine(options),
        "logging": [],
        "queries": [],
        "memory": [],
    }
    document["million"] = None
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "logging" in chosen:
            cases = {"GPT, 4 layers": gpt_case, "CNN, 3 convolutions": cnn_case}
            document["logging"] = [measure_logging(n, case, options, folder) for n, case in cases.items()]
        if "queries" in chosen:
            document["queries"] = [
                measure_queries(options, folder, d) for d in ("fp16", "bf16", "int8", "fp32")
            ]
        if "memory" in chosen:
            document["memory"] = measure_memory(options, folder)
        if "million" in chosen:
            document["million"] = measure_million(options, folder)
    document["seconds"] = round(time.perf_counter() - started)
    show(document, console)
    out = options.out or (None if options.quick or options.only else RESULTS / "index-cpu.json")
    pages.keep(document, out, "index", "influence", figures)


if __name__ == "__main__":
    main()
