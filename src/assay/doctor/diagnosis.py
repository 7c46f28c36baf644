"""What an examination finds, and the mending of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from assay.store.files import write_error

__all__ = ["Diagnosis", "Finding", "Room", "set_aside"]

ASIDE = "damaged"
"""Damaged files are moved into this folder, beside what is whole."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Args:
        place: the file or folder.
        state: "damaged", "missing", "unreadable" (just now: what is in it may be whole, so that it is never moved), or
            "left over" (harmless: what a killed writer did not finish).
        detail: what is wrong, and what it costs.
        cure: what `mend` does about it; empty if nothing can be done without a copy of the file.
        mend: does it.
    """

    place: Path
    state: Literal["damaged", "missing", "unreadable", "left over"]
    detail: str
    cure: str = ""
    mend: Callable[[], None] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Room:
    """One store within the folder.

    Args:
        place: its folder.
        kind: "run", "index" or "rows".
        contents: table → how many rows of it are whole.
        note: what else there is to say of it, which is no fault.
    """

    place: Path
    kind: Literal["run", "index", "rows"]
    contents: dict[str, int]
    note: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What an examination found.

    Args:
        rooms: every store in the folder.
        findings: everything that is not whole.
    """

    rooms: tuple[Room, ...]
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Whether everything is there, was read and is not damaged; what a killed writer left over does no harm."""
        return all(finding.state == "left over" for finding in self.findings)

    def mend(self) -> list[Finding]:
        """Do what the findings offer.

        Returns:
            The findings that were mended, in order.

        Raises:
            StoreError: the disk refused; what was mended before it stays so.
        """
        mended = []
        for finding in self.findings:
            if finding.mend is not None:
                finding.mend()
                mended.append(finding)
        return mended


def set_aside(root: Path, path: Path) -> None:
    """Move a file into the room's folder of damaged files, by its own relative name; StoreError if the disk refuses."""
    there = root / ASIDE / path.relative_to(root)
    try:
        there.parent.mkdir(parents=True, exist_ok=True)
        number = 0
        while there.exists():  # an earlier one of the same name stays
            number += 1
            there = there.with_name(f"{path.name}.{number}")
        path.replace(there)
    except OSError as error:
        raise write_error(there, error) from error
