"""Examining an index: its header, projections and curvature; its rows are a store of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from assay.doctor.diagnosis import Finding, Room
from assay.errors import NewerFormatError, StoreError, UnreadableError
from assay.index.curvature import forget_curvature, is_stored
from assay.index.header import NAME, read_header, stored_sides
from assay.rows import Folder

__all__ = ["examine_index"]


def examine_index(root: Path) -> tuple[Room, list[Finding]]:
    """Read the header, the projections and the curvature of an index against their checksums.

    Raises:
        StoreError: it was written by a newer version of assay.
    """
    folder = Folder(root)
    try:
        header = read_header(folder)
        assert header is not None  # the file is why we are here
        if not header.projection.drawn_again:
            stored_sides(folder, header)
    except NewerFormatError:
        raise
    except UnreadableError as error:
        return Room(root, "index", {}), [Finding(root / NAME, "unreadable", str(error))]
    except StoreError as error:
        return Room(root, "index", {}), [Finding(root / NAME, "damaged", str(error))]
    findings = []
    arrays = _curvature_arrays(folder)
    try:
        if is_stored(folder):
            for name in arrays:
                folder.read_array(name)
    except UnreadableError as error:
        findings.append(Finding(root / "curvature", "unreadable", str(error)))
    except StoreError as error:
        cure = "forget it: building the index again with the same examples forms it anew from the rows"
        findings.append(
            Finding(root / "curvature", "damaged", str(error), cure, partial(forget_curvature, folder))
        )
    return Room(root, "index", {"layers": len(header.layers), "width": header.width}), findings


def _curvature_arrays(folder: Folder) -> list[str]:
    names = {name.rsplit("/zarr.json", 1)[0] for name in folder.names() if name.endswith("/zarr.json")}
    return sorted(name for name in names if name.startswith("curvature/"))
