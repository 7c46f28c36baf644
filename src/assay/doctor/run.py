"""Examining a run folder: the header, the parts of its tables, its side tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from assay.doctor.diagnosis import Finding, Room, set_aside
from assay.errors import NewerFormatError, StoreError, UnreadableError
from assay.store.files import (
    FrameFile,
    frame_file,
    frame_schema,
    scan_frames,
    unreadable,
    verify_frame,
    write_error,
)
from assay.store.header import NAME, Header, read_header
from assay.store.ids import kind_of_dtype
from assay.store.parts import PART
from assay.store.schema import DETAILS, PARTED, STEPWISE, TABLES, targets_of
from assay.store.tensors import snapshot_files

__all__ = ["examine_run"]


def examine_run(root: Path) -> tuple[Room, list[Finding]]:
    """Read every file of a run against its checksum.

    Raises:
        StoreError: the run was written by a newer version of assay.
    """
    findings: list[Finding] = []
    contents: dict[str, int] = {}
    header = _header(root, findings)
    recorded = [table for table in (*DETAILS, *STEPWISE) if (root / table).is_dir()]
    for table in (*PARTED, *recorded, TABLES):
        folder = root / table
        if not folder.is_dir():
            what = "the folder is not there, and nothing of what was in it"
            findings.append(Finding(folder, "missing", what, "make it, empty", partial(_make, folder)))
            contents |= {} if table == TABLES else {table: 0}
            continue
        if (files := _frames(folder)) is None:
            continue  # `examine` names every folder that cannot be listed
        whole, unread = _whole_frames(root, files, findings)
        if table != TABLES:
            expected = None if header is None or header.parts is None else header.parts.get(table, 0)
            findings += _gaps(folder, [file.number for file in (*whole.values(), *unread)], expected)
            contents[table] = _rows(list(whole))
    findings += _snapshots(root)
    findings += _leftovers(root)
    return Room(root, "run", contents, "" if findings else _emptiness(root, header, contents)), findings


def _emptiness(root: Path, header: Header | None, contents: dict[str, int]) -> str:
    """That a whole run holds nothing: one that was killed before its first rows reached the disk, say."""
    elsewhere = any((root / name).is_dir() for name in ("snapshots", "embeddings"))
    if header is None or elsewhere or any(contents.values()):
        return ""
    return "nothing was recorded yet" if header.parts is None else "nothing was recorded"


def _header(root: Path, findings: list[Finding]) -> Header | None:
    """The run's header; a finding if it cannot be used."""
    path = root / NAME
    try:
        return read_header(root)
    except NewerFormatError:
        raise
    except UnreadableError as error:
        findings.append(Finding(path, "unreadable", str(error)))
        return None
    except StoreError as error:
        try:
            again = _was_resumed(root)
        except UnreadableError as refused:  # a header made up from the other parts might be another run's
            detail = f"{error}; it can be written anew once all values can be read: {refused}"
            findings.append(Finding(path, "damaged" if path.exists() else "missing", detail))
            return None
        findings.append(
            Finding(
                path,
                "damaged" if path.exists() else "missing",
                str(error)
                + ("; the run was resumed, and only this file says from which step on" if again else ""),
                "" if again else "write it anew from the values, without the caller's info",
                None if again else partial(_rebuild_header, root),
            )
        )
        return None


def _was_resumed(root: Path) -> bool:
    """Whether a micro-batch stands in two parts: once overruled, and once as it was taken again."""
    parts = [path for path in sorted((root / "values").glob("part-*.parquet")) if _is_whole(path)]
    batches = [scan_frames([path]).select("step", "micro").unique().collect() for path in parts]
    return bool(batches) and bool(pl.concat(batches).is_duplicated().any())


def _is_whole(path: Path) -> bool:
    """Whether a part can be trusted; UnreadableError where that cannot be said."""
    try:
        verify_frame(path)
    except UnreadableError:
        raise
    except StoreError:
        return False
    return True


def _rebuild_header(root: Path) -> None:
    """`run.json` from what the parts of the values say; the damaged one is set aside."""
    targets: tuple[str, ...] = ()
    ids = None
    whole = (path for path in sorted((root / "values").glob("part-*.parquet")) if _is_whole(path))
    if (first := next(whole, None)) is not None:
        schema = frame_schema(first)
        targets, ids = targets_of(schema), kind_of_dtype(schema["id"])
    if (root / NAME).exists():
        set_aside(root, root / NAME)
    Header(targets, ids, {"recovered": True}).write(root)


def _frames(folder: Path) -> dict[Path, FrameFile] | None:
    """The frames of a table by their names, without the user's own files and leftovers; None if it cannot be listed."""
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return None
    return {path: file for path in paths if (file := frame_file(path)) is not None}


def _whole_frames(
    root: Path, files: dict[Path, FrameFile], findings: list[Finding]
) -> tuple[dict[Path, FrameFile], list[FrameFile]]:
    """The frames that can be trusted, and those of which nothing can be said; a finding for each but the first."""
    whole: dict[Path, FrameFile] = {}
    unread: list[FrameFile] = []
    for path, file in files.items():
        try:
            verify_frame(path)
            frame_schema(path)
        except UnreadableError as error:
            findings.append(Finding(path, "unreadable", str(error)))
            unread.append(file)
        except StoreError as error:
            findings.append(
                Finding(
                    path,
                    "damaged",
                    f"{error}",
                    "move it aside, so that the rest of the run opens",
                    partial(set_aside, root, path),
                )
            )
        else:
            whole[path] = file
    return whole, unread


def _gaps(folder: Path, numbers: list[int], expected: int | None) -> Iterator[Finding]:
    """A finding for every part that should be there, and for every number that is there twice."""
    last = max(max(numbers, default=-1) + 1, expected or 0)
    for number in sorted(set(range(last)) - set(numbers)):
        yield Finding(
            folder / f"{PART}-{number:06d}",
            "missing",
            "no whole part of this number: its rows are not in the ledger",
        )
    for number in sorted({n for n in numbers if numbers.count(n) > 1}):
        yield Finding(
            folder / f"{PART}-{number:06d}",
            "damaged",
            "two different parts have this number: move the one that is not this run's out of the folder",
        )


def _rows(paths: list[Path]) -> int:
    return sum(int(pq.read_metadata(path).num_rows) for path in paths)  # not all of one schema


def _snapshots(root: Path) -> Iterator[Finding]:
    """A finding for every snapshot whose content is not what its name says."""
    files = snapshot_files(root)
    for path, error in files.damaged():
        if isinstance(error.__cause__, OSError):  # nothing was read of it
            yield Finding(path, "unreadable", str(unreadable(path, error.__cause__)))
            continue
        yield Finding(
            path,
            "damaged",
            f"{error}",
            "move it aside: a replay starts from the snapshot before it",
            partial(set_aside, root, path),
        )


def _leftovers(root: Path) -> Iterator[Finding]:
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        with suppress(OSError):  # `examine` names every folder that cannot be listed
            for path in sorted(folder.glob("*.tmp")):
                what = "a write that was never finished"
                yield Finding(path, "left over", what, "delete it", partial(_delete, path))


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
