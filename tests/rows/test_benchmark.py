"""The benchmark of ten million rows, with thousands: it finds what it planted, and notices what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from assay.rows import RowDtype, reader

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rows.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("rows_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script: what it imports lies beside it
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_what_is_written_is_found_again(benchmark: Any, dtype: RowDtype, tmp_path: Path) -> None:
    found = {name: benchmark.stage(name, tmp_path / "rows", 5000, dtype) for name in benchmark.STAGES}
    benchmark.check(5000, found, dtype)
    assert all(answer["peak_resident"] > 0 for answer in found.values())
    found["search"]["best"][3] += 1
    with pytest.raises(AssertionError, match="did not find"):
        benchmark.check(5000, found, dtype)
    found["search"]["best"][3] -= 1
    found["aggregate"]["sums"][2] += 10.0
    with pytest.raises(AssertionError, match="sums by domain"):
        benchmark.check(5000, found, dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_search_takes_no_more_memory_for_more_rows(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 1 MiB: 100,000 rows are 51 MB, and only the ids of all of them are held."""
    monkeypatch.setattr(reader, "PIECE_BYTES", 1 << 20)
    taken = []
    for count in (5_000, 5_000, 100_000):  # the first warms up
        place = tmp_path / f"{len(taken)}"
        benchmark.write(place, count, "fp16")
        before = benchmark.overhead.resident_peak(afresh=True)
        benchmark.search(place)
        taken.append(benchmark.overhead.resident_peak() - before)
    assert taken[2] < taken[1] + (16 << 20)
