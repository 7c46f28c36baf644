"""Ten million rows of 256 numbers: written, opened again, searched and added up, in how much memory.

Each of these is done by a process of its own, for several N: what memory a process takes at most must not grow with the
rows, of which 8 bytes each are their ids. The rows are drawn; some of them are planted, so that the best rows and the
sums by domain are known, and what a process answers is compared with them.

* write: `RowWriter`, rows of a shard at a time, as an index or a recording writes them;
* search: the 10 best rows for each of 16 directions (`best_rows`: what `Index.search` does);
* aggregate: the value of every row along one direction, summed by domain, as `ledger.by` sums a run's values.

    python benchmarks/rows.py             # about four minutes on two cores, 6 GiB of disk for a while
    python benchmarks/rows.py --quick     # half a minute, nothing written
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
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.index.scores import best_rows, stream_scores
from assay.rows import Folder, RowDtype, RowReader, RowWriter

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WIDTH, QUERIES, K, DOMAINS = 256, 16, 10, 8
STAGES = ("write", "search", "aggregate")


def _sibling(name: str) -> Any:
    """Another script of this folder."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


overhead = _sibling("overhead")


def directions() -> Tensor:
    """`[QUERIES, WIDTH]` of length one."""
    found = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(1))
    return found / found.norm(dim=1, keepdim=True)


def planted(count: int) -> Tensor:
    """`[QUERIES, K]`: the rows that are best for each direction, the best first."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(2))[: QUERIES * K].view(QUERIES, K)


def write(folder: Path, count: int, dtype: RowDtype) -> dict[str, Any]:
    """Fill a store; the sums by domain of what was written, float64."""
    writer = RowWriter(Folder(folder), WIDTH, dtype)
    shard = writer.manifest.shard
    some = torch.randn(min(shard, count), WIDTH, generator=torch.Generator().manual_seed(0))
    strong, where = directions(), planted(count)
    order = where.flatten().argsort()
    at, query, rank = where.flatten()[order], order // K, order % K
    sums = torch.zeros(DOMAINS, WIDTH, dtype=torch.float64)
    for start in range(0, count, shard):
        n = min(shard, count - start)
        rows = some.roll(start // shard, 0)[:n].clone()
        inside = (at >= start) & (at < start + n)
        rows[at[inside] - start] = strong[query[inside]] * (200.0 - rank[inside, None])
        ids = torch.arange(start, start + n)
        writer.append(pl.DataFrame({"id": ids.numpy()}), rows)
        stored = rows.half().double() if dtype == "fp16" else rows.double()
        sums.index_add_(0, ids % DOMAINS, stored)
    writer.close()
    return {"sums": (sums @ strong[0].double()).tolist()}


def search(folder: Path) -> dict[str, Any]:
    """The ids of the best rows for each direction."""
    reader = RowReader(Folder(folder))
    _, rows = best_rows(reader, directions(), K)
    return {"best": reader.table["id"].gather(rows.flatten().numpy()).to_list()}


def aggregate(folder: Path) -> dict[str, Any]:
    """The sums by domain of the values along the first direction."""
    reader = RowReader(Folder(folder))
    sums = torch.zeros(DOMAINS, dtype=torch.float64)
    for start, scores in stream_scores(reader, directions()[:1]):
        ids = reader.table["id"][start : start + scores.shape[1]]
        domains = torch.from_numpy((ids % DOMAINS).to_numpy().copy())
        sums.index_add_(0, domains, scores[0].double())
    return {"sums": sums.tolist()}


def stage(name: str, folder: Path, count: int, dtype: RowDtype) -> dict[str, Any]:
    """One of `STAGES` in this process: seconds, peak of resident memory, and what it answers."""
    before = overhead.resident_peak(afresh=True)
    started = time.perf_counter()
    if name == "write":
        answer = write(folder, count, dtype)
    else:
        answer = search(folder) if name == "search" else aggregate(folder)
    seconds = time.perf_counter() - started
    peak = overhead.resident_peak()
    return {"seconds": seconds, "resident_before": int(before), "peak_resident": int(peak), **answer}


def measure(count: int, dtype: RowDtype, folder: Path, threads: int) -> dict[str, Any]:
    """All stages, each in a process of its own, and whether the answers are right."""
    place = folder / f"rows-{count}"
    found: dict[str, Any] = {}
    for name in STAGES:
        command = [sys.executable, __file__, "--stage", name, "--at", str(place), "--rows", str(count)]
        command += ["--dtype", dtype, "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    shutil.rmtree(place)
    check(count, found, dtype)
    for answers in found.values():
        answers.pop("sums", None), answers.pop("best", None)
    return {"rows": count, "bytes": size, **found}


def check(count: int, found: dict[str, Any], dtype: RowDtype) -> None:
    """The planted rows are the best ones, and the sums are those of what was written.

    Raises:
        AssertionError: an answer is wrong.
    """
    if found["search"]["best"] != planted(count).flatten().tolist():
        raise AssertionError(f"{count} rows: the search did not find the planted rows")
    written, read = (torch.tensor(found[name]["sums"]) for name in ("write", "aggregate"))
    allowed = (1e-5 if dtype == "fp16" else 1e-3) * (written.abs().max() + count**0.5)
    if not bool((written - read).abs().max() <= allowed):
        raise AssertionError(f"{count} rows: the sums by domain are {read} and not {written}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, show, and write `results/rows-cpu.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows, and nothing written")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--dtype", choices=["fp16", "int8"], default="fp16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.stage:
        print(json.dumps(stage(options.stage, options.at, options.rows[0], options.dtype)))
        return
    counts = [5_000, 50_000] if options.quick else options.rows
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(count, options.dtype, Path(folder), options.threads) for count in counts]
    document = {
        "command": "python benchmarks/rows.py",
        "machine": overhead.machine(argparse.Namespace(device="cpu")),
        "width": WIDTH, "dtype": options.dtype, "queries": QUERIES, "k": K, "domains": DOMAINS, "runs": found,
    }  # fmt: skip
    for run in found:
        parts = ", ".join(
            f"{name} {run[name]['seconds']:.1f} s at {run[name]['peak_resident'] / 2**20:.0f} MiB"
            for name in STAGES
        )
        print(f"{run['rows']:>10,} rows, {run['bytes'] / 2**20:,.0f} MiB: {parts}")
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "rows-cpu.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
