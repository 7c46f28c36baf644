"""Finding the stores of a folder, and examining each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from assay.doctor.diagnosis import ASIDE, Diagnosis, Finding, Room
from assay.doctor.index import examine_index
from assay.doctor.rows import examine_rows
from assay.doctor.run import examine_run
from assay.errors import StoreError
from assay.index.header import NAME as INDEX
from assay.rows.format import NAME as ROWS
from assay.store.files import local_path, unreadable
from assay.store.header import NAME as RUN
from assay.store.schema import PARTED

__all__ = ["examine"]

EXAMINERS = {"run": examine_run, "index": examine_index, "rows": examine_rows}


def examine(path: str | Path) -> Diagnosis:
    """Read everything below a folder that assay wrote against its checksums; nothing is changed.

    Args:
        path: a run folder, an index, or a folder above several of them.

    Raises:
        StoreError: there is nothing of assay's, or it is of a newer version.

    Example:
        >>> import tempfile
        >>> from assay.store import RunWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     RunWriter(f"{folder}/run", targets=["code"]).close()
        ...     diagnosis = examine(f"{folder}/run")
        >>> diagnosis.whole, diagnosis.rooms[0].contents
        (True, {'values': 0, 'account': 0, 'metadata': 0})
    """
    root = local_path(path)
    if not root.is_dir():
        raise StoreError(f"there is no folder {root}: name a run or an index")
    rooms: list[Room] = []
    findings: list[Finding] = []
    for place, kind in _stores(root, findings):
        room, found = EXAMINERS[kind](place)
        rooms.append(room)
        findings += found
    if not rooms and findings:
        raise StoreError(findings[0].detail)
    if not rooms:
        raise StoreError(f"there is neither a run nor an index in {root}: name the out= of one")
    return Diagnosis(tuple(rooms), tuple(findings))


def _stores(root: Path, findings: list[Finding]) -> Iterator[tuple[Path, str]]:
    """Every store below a folder, outermost first; a finding for each folder that cannot be listed."""

    def refused(error: OSError) -> None:
        place = Path(error.filename)
        findings.append(Finding(place, "unreadable", str(unreadable(place, error))))

    for folder, inner, files in os.walk(root, onerror=refused):
        inner[:] = sorted(name for name in inner if name != ASIDE)
        here = Path(folder)
        if RUN in files or all(name in inner for name in PARTED):  # the header itself may be what is missing
            yield here, "run"
        if INDEX in files:
            yield here, "index"
        if ROWS in files:
            yield here, "rows"
