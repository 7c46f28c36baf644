"""Rows come back as they were written, whatever type stores them; and no damage goes unseen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from assay.doctor import examine
from assay.errors import InputError, StoreError
from assay.rows import DTYPES, Background, Folder, RowDtype, RowReader, RowWriter, Share, join, products

WIDTH = 6
BLOCKS = [(0, 4), (4, 6)]


def table(start: int, stop: int) -> pl.DataFrame:
    return pl.DataFrame({"id": [f"example {i}" for i in range(start, stop)]})


def rows(n: int) -> Tensor:
    return torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:n]


def filled(folder: Folder, dtype: RowDtype = "fp32", n: int = 11, close: bool = True) -> RowWriter:
    writer = RowWriter(folder, WIDTH, dtype, BLOCKS, shard=4)
    data = rows(n)
    for start in range(0, n, 3):
        writer.append(table(start, min(start + 3, n)), data[start : start + 3])
    if close:
        writer.close()
    return writer


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_rows_come_back(dtype: RowDtype, disk: bool, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "of a user #1" if disk else None)
    filled(folder, dtype)
    reader = RowReader(folder)
    truth = rows(11)
    if dtype == "int8":
        steps = (
            torch.cat([truth[:, a:b].abs().amax(1, keepdim=True).expand(-1, b - a) for a, b in BLOCKS], 1)
            / 127
        )
        assert ((reader.read(0, 11) - truth).abs() <= steps * 0.5001).all()
    else:
        stored = truth.to(DTYPES[dtype])
        expected = stored if dtype == "fp64" else stored.float()
        assert torch.equal(reader.read(0, 11), expected)
        assert torch.equal(reader.read(3, 9), expected[3:9])
    assert reader.table["id"].to_list() == table(0, 11)["id"].to_list()
    for size in (1, 4, 5, 100, None):
        pieces = list(reader.pieces(size))
        assert [start for start, _ in pieces] == list(range(0, 11, size or 11))[: len(pieces)]
        assert torch.equal(torch.cat([piece for _, piece in pieces]), reader.read(0, 11))


def test_several_shards_each_a_file_and_another_reader_of_zarr_could_open_them(tmp_path: Path) -> None:
    filled(Folder(tmp_path))
    assert sorted(p.name for p in (tmp_path / "data" / "c").iterdir()) == ["0", "1", "2"]
    raw = np.fromfile(tmp_path / "data" / "c" / "0" / "0", dtype="<f4", count=4 * WIDTH)
    assert np.array_equal(raw.reshape(4, WIDTH), rows(4).float().numpy())


def test_a_writer_that_died_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    filled(Folder(tmp_path / "whole"))
    for n in range(12):  # dies with n rows taken, the last of them not committed
        place = tmp_path / f"killed {n}"
        filled(Folder(place), n=n, close=False)
        writer = RowWriter(Folder(place), WIDTH, "fp32", BLOCKS, shard=4)
        assert writer.rows == n // 4 * 4
        writer.append(table(writer.rows, 11), rows(11)[writer.rows :])
        writer.close()
        assert content(place) == content(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_a_shard_may_be_committed_before_it_is_full(dtype: RowDtype, disk: bool, tmp_path: Path) -> None:
    """And a writer that goes on after fewer rows than there are ends as one that never wrote the others."""
    whole = Folder(tmp_path / "whole" if disk else None)
    filled(whole, dtype)
    for n, kept in [(1, 1), (3, 2), (4, 3), (6, 5), (6, 0), (8, 4), (11, 7), (11, 11)]:
        place = Folder(tmp_path / f"{n} {kept}" if disk else None)
        begun = filled(place, dtype, n, close=n % 2 == 0)  # a store that is complete can be gone on with, too
        if not begun.manifest.complete:
            begun.flush()
        assert RowReader(place).manifest.rows == n
        writer = RowWriter(place, WIDTH, dtype, BLOCKS, shard=4, keep=kept)
        assert writer.rows == kept
        assert RowReader(place).table["id"].to_list() == table(0, kept)["id"].to_list()
        for row in range(kept, 11):
            writer.append(table(row, row + 1), rows(11)[row : row + 1])
            if row % 3:
                writer.flush()
                assert torch.equal(RowReader(place).read(0, row + 1), RowReader(whole).read(0, row + 1))
        writer.close()
        assert {name: place.read(name) for name in place.names()} == {
            name: whole.read(name) for name in whole.names()
        }


def test_a_writer_that_is_killed_between_any_two_writes_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit makes an open shard longer, or the store goes back to fewer rows: readers find one or the other."""
    filled(Folder(tmp_path / "whole"))
    original, left = (Folder.write, Folder.delete), [0]

    def dying(act: Callable[..., None]) -> Callable[..., None]:
        def acts(self: Folder, *args: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            act(self, *args)

        return acts

    seen = set()
    for act in range(1, 12):
        place = tmp_path / str(act)
        filled(Folder(place), n=7, close=False).flush()
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write", dying(original[0]))
            patch.setattr(Folder, "delete", dying(original[1]))
            left[0] = act
            with suppress(KeyboardInterrupt):
                writer = RowWriter(Folder(place), WIDTH, "fp32", BLOCKS, shard=4, keep=6)
                writer.append(table(6, 10), rows(11)[6:10])
                writer.flush()
        reader = RowReader(Folder(place))
        seen.add(len(reader))
        assert torch.equal(reader.read(0, len(reader)), rows(11)[: len(reader)].float())
        assert examine(place).whole
        writer = RowWriter(Folder(place), WIDTH, "fp32", BLOCKS, shard=4, keep=5)
        writer.append(table(5, 11), rows(11)[5:])
        writer.close()
        assert content(place) == content(tmp_path / "whole")
    assert seen == {6, 7, 8, 10}


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = """
import sys
from assay.rows import Folder, RowWriter
writer = RowWriter(Folder(sys.argv[1]), 6, "fp32", [(0, 4), (4, 6)], shard=4)
print("ready", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "rows")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(StoreError, match=r"another process writes into .*rows: end it first"):
            RowWriter(Folder(tmp_path / "rows"), WIDTH, "fp32", BLOCKS, shard=4)
        other.kill()
    filled(Folder(tmp_path / "rows"))


def error_of_reading(path: Path, truth: Tensor) -> str | None:
    """What is said of a damaged store; None if it still reads, and then everything right."""
    try:
        found = RowReader(Folder(path)).read(0, 11)
    except StoreError as error:
        return str(error)
    assert torch.equal(found, truth)
    return None


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_every_flipped_bit_is_named_or_harmless(dtype: RowDtype, tmp_path: Path) -> None:
    filled(Folder(tmp_path), dtype)
    truth = RowReader(Folder(tmp_path)).read(0, 11)
    seen = 0
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        before = path.read_bytes()
        for at in range(0, len(before), max(1, len(before) // 7)):
            path.write_bytes(before[:at] + bytes([before[at] ^ 4]) + before[at + 1 :])
            message = error_of_reading(tmp_path, truth)
            if message is None:
                assert path.name == "zarr.json"  # the spelling of a default, say
            else:
                assert "\n" not in message
                seen += path.name in message or path.parent.name in message or str(tmp_path) in message
        path.write_bytes(before)
    assert seen > 30


def test_a_lost_or_cut_shard_is_named(tmp_path: Path) -> None:
    filled(Folder(tmp_path))
    shard = tmp_path / "data" / "c" / "1" / "0"
    data = shard.read_bytes()
    shard.write_bytes(data[:-3])
    reader = RowReader(Folder(tmp_path))
    with pytest.raises(StoreError, match="c/1/0"):
        reader.read(0, 11)
    with pytest.raises(StoreError, match="c/1/0"):
        list(reader.pieces())
    shard.unlink()
    with pytest.raises(StoreError, match="c/1/0"):
        RowReader(Folder(tmp_path)).read(5, 6)
    assert torch.equal(RowReader(Folder(tmp_path)).read(0, 4), rows(4).float())  # the others are as they were
    part = next((tmp_path / "table").glob("part-000002*"))
    part.unlink()
    with pytest.raises(StoreError, match="part-000002"):
        RowReader(Folder(tmp_path))


def test_a_disk_that_refuses_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RowWriter(Folder(tmp_path / "store"), WIDTH, "fp32", BLOCKS, shard=4)
    write = Folder.write

    def refuse(self: Folder, name: str, data: bytes) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Folder, "write", refuse)
    for start in (0, 4):
        with pytest.raises(StoreError, match="full"):
            writer.append(table(start, start + 4), rows(11)[start : start + 4])
    assert writer.rows == 0
    monkeypatch.setattr(Folder, "write", write)
    writer.append(table(8, 11), rows(11)[8:])
    writer.close()
    filled(Folder(tmp_path / "whole"))
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_refusals(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "rows")
    with pytest.raises(StoreError, match="no rows"):
        RowReader(folder)
    writer = filled(folder, close=False)
    with pytest.raises(StoreError, match="other settings"):
        RowWriter(folder, WIDTH, "bf16", BLOCKS, shard=4)
    with pytest.raises(InputError, match="give \\[2, 6\\]"):
        writer.append(table(0, 2), torch.zeros(3, 6))
    with pytest.raises(InputError, match="example 1 of the batch is not finite"):
        writer.append(table(0, 2), torch.tensor([[0.0] * 6, [float("nan")] * 6]))
    with pytest.raises(InputError, match="too large"):
        RowWriter(Folder(None), 1, "fp16").append(table(0, 1), torch.full((1, 1), 1e6))
    writer.close()
    writer.close()
    with pytest.raises(StoreError, match="takes no more rows"):
        RowWriter(folder, WIDTH, "fp32", BLOCKS, shard=4)
    with pytest.raises(InputError, match="the store has 11"):
        RowReader(folder).read(5, 12)
    with pytest.raises(InputError, match="fp12"):
        RowWriter(folder, WIDTH, "fp12")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        RowWriter(Folder(tmp_path / "file" / "rows"), WIDTH)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("n", [11, 8, 3])
def test_several_writers_leave_the_bytes_of_one(dtype: RowDtype, parts: int, n: int, tmp_path: Path) -> None:
    filled(Folder(tmp_path / "one"), dtype, n=n)
    folder = Folder(tmp_path / "several")
    for part in reversed(range(parts)):
        share = Share(part, parts)
        writer = RowWriter(folder, WIDTH, dtype, BLOCKS, shard=4, share=share)
        for _, start, stop in share.own(0, n, 4):
            writer.append(table(start, stop), rows(n)[start:stop])
        if part:
            writer.close()
    with pytest.raises(StoreError, match="part 0 of"):
        join(folder, parts)
    writer.close()
    join(folder, parts)
    assert content(tmp_path / "several") == content(tmp_path / "one")
    join(folder, parts)


def test_a_part_of_other_examples_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for part, n in ((0, 11), (1, 6)):
        share = Share(part, 2)
        writer = RowWriter(folder, WIDTH, "fp32", BLOCKS, shard=4, share=share)
        for _, start, stop in share.own(0, n, 4):
            writer.append(table(start, stop), rows(11)[start:stop])
        writer.close()
    with pytest.raises(StoreError, match="part 0 has 7 rows where 5 were expected"):
        join(folder, 2)
    with pytest.raises(InputError, match="part 2 of 2"):
        Share(2, 2)


def test_the_background_raises_what_happened_there() -> None:
    done: list[int] = []

    def call(n: int) -> None:
        if n == 3:
            raise StoreError("the disk is full")
        done.append(n)

    def calls(numbers: range, waiting: int, stop: bool = False) -> None:
        with Background(call, waiting) as background:
            for n in numbers:
                background.put(n)
            if stop:
                raise KeyError

    with pytest.raises(StoreError, match="full"):
        calls(range(100), 1)
    assert done == [0, 1, 2]
    with pytest.raises(StoreError, match="full"):
        calls(range(3, 4), 2)
    with pytest.raises(KeyError):
        calls(range(3, 4), 2, stop=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_rows(dtype: RowDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(None)
    filled(folder, dtype)
    reader = RowReader(folder)
    whole = reader.read(0, 11)
    monkeypatch.setattr(RowReader, "piece_rows", lambda self: 4)
    monkeypatch.setitem(products.__globals__, "BLOCK_BYTES", 3 * WIDTH * 4)
    directions = torch.randn(3, WIDTH, dtype=whole.dtype)
    columns = [slice(a, b) for a, b in BLOCKS]
    for parts in (None, columns):
        found = list(products(reader, directions, lambda *piece: piece, parts, lengths=True))
        assert [s for s, _, _ in found] == [0, 4, 8]
        scores = torch.cat([x for _, x, _ in found], 1)
        if parts is not None:
            apart = [directions[:, c] @ whole[:, c].t() for c in columns]
            torch.testing.assert_close(scores, torch.stack(apart, 2))
        else:
            torch.testing.assert_close(scores, directions @ whole.t())
        torch.testing.assert_close(torch.cat([n for _, _, n in found if n is not None]), whole.norm(dim=1))
