"""Examining a store of rows: its manifest, the ids of its parts, every chunk of its shards."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from assay.doctor.diagnosis import Finding, Room
from assay.errors import NewerFormatError, StoreError, UnreadableError
from assay.index.curvature import forget_curvature
from assay.index.header import NAME as INDEX
from assay.rows import Folder
from assay.rows.format import NAME, Manifest, read_manifest
from assay.rows.table import leftover_parts, read_parts
from assay.rows.writer import resized

__all__ = ["examine_rows"]


def examine_rows(root: Path) -> tuple[Room, list[Finding]]:
    """Read every committed row against its checksum.

    Raises:
        StoreError: the store was written by a newer version of assay.
    """
    folder = Folder(root)
    try:
        manifest = read_manifest(folder)
    except NewerFormatError:
        raise
    except UnreadableError as error:
        return Room(root, "rows", {}), [Finding(root / NAME, "unreadable", str(error))]
    except StoreError as error:
        return Room(root, "rows", {}), [Finding(root / NAME, "damaged", str(error))]
    assert manifest is not None  # the file is why we are here
    findings = []
    whole, error_ = _whole_rows(folder, manifest)
    if isinstance(error_, UnreadableError):
        detail = f"{error_}; nothing can be said of the {manifest.rows - whole} rows from row {whole} on"
        findings.append(Finding(root, "unreadable", detail))
    elif error_ is not None:
        lost = manifest.rows - whole
        findings.append(
            Finding(
                root,
                "damaged",
                f"{error_}; {lost} of {manifest.rows} rows, from row {whole} on, cannot be trusted",
                f"go back to the first {whole} rows: building it again with the same examples makes the rest anew",
                partial(_go_back, root, folder, manifest, whole),
            )
        )
    for name in leftover_parts(folder, manifest.parts):
        findings.append(
            Finding(
                root / "table" / name,
                "left over",
                "a part that was never committed",
                "delete it",
                partial(folder.below("table").delete, name),
            )
        )
    return Room(root, "rows", {"rows": whole}), findings


def _whole_rows(folder: Folder, manifest: Manifest) -> tuple[int, StoreError | None]:
    """How many rows from the first on are whole, and what is wrong with the next."""
    whole = 0
    try:
        arrays = [(name, folder.open_array(name)) for name in _arrays(manifest)]
        for part in range(manifest.parts):
            start, stop = part * manifest.shard, min((part + 1) * manifest.shard, manifest.rows)
            lines = len(read_parts(folder, {part: stop - start})[0])
            if lines != stop - start:
                raise folder.damaged(f"table/part-{part:06d}", f"{lines} lines for {stop - start} rows")
            for name, array in arrays:
                for chunk in range(start, stop, manifest.chunk):
                    try:
                        array[chunk : min(chunk + manifest.chunk, stop)].read().result()
                    except (ValueError, OSError) as error:
                        raise folder.refused("read", name, error) from error
            whole = stop
    except StoreError as error:
        return whole, error
    return whole, None


def _arrays(manifest: Manifest) -> list[str]:
    return ["data", "scales"] if manifest.dtype == "int8" else ["data"]


def _go_back(root: Path, folder: Folder, manifest: Manifest, rows: int) -> None:
    """Commit fewer rows; what was formed of all of them is forgotten first."""
    if (root.parent / INDEX).exists():
        forget_curvature(Folder(root.parent))
    replace(manifest, rows=rows, complete=False).write(folder)
    for name in _arrays(manifest):
        array = folder.open_array(name)
        resized(folder, name, array, [rows, array.shape[1]])
