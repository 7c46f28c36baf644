"""`run.json`: what a run folder says about itself."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from assay.errors import InputError, NewerFormatError, StoreError
from assay.store.files import damaged, unreadable, write_atomic
from assay.store.ids import IdKind

FORMAT = "assay run"
VERSION = 2  # of the newest format; a run without cuts is written as version 1
NAME = "run.json"


@dataclass(frozen=True)
class Cut:
    """Where a resumed run went on.

    Args:
        step: Of the rows in the parts below, those from this step on count no more.
        parts: How many parts each table had.
    """

    step: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Header:
    """Targets, kind of ids and the caller's info of one run.

    Args:
        targets: Names of the targets, in the order of the value columns.
        ids: Kind of the run's ids; None until the first one is seen.
        info: The caller's own JSON object.
        parts: Number of parts of each table, set when the run is closed; None while it is open or if it died.
        cuts: Where the run went on from a checkpoint, in order.
    """

    targets: tuple[str, ...]
    ids: IdKind | None = None
    info: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, int] | None = None
    cuts: tuple[Cut, ...] = ()

    def merged(self, info: dict[str, Any]) -> Header:
        """Header with more info; a key that is already there is replaced.

        Raises:
            InputError: `info` is not JSON.
        """
        if not isinstance(info, dict):
            raise InputError(f"info must be a dict of JSON values, not {type(info).__name__}")
        for key, value in info.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"info[{key!r}] is not JSON ({error}): use numbers, strings, lists, dicts"
                ) from error
        # Through JSON and back, so that memory holds what the disk will, and shares nothing with the caller.
        return replace(self, info={**self.info, **json.loads(json.dumps(info))})

    def write(self, folder: Path) -> None:
        """Replace `run.json` as a whole; StoreError if the disk refuses."""
        fields = {"format": FORMAT, "version": 2 if self.cuts else 1, **asdict(self)}
        if not self.cuts:
            del fields["cuts"]
        text = json.dumps(fields | {"crc32": checksum(fields)}, indent=1)
        write_atomic(folder / NAME, text.encode() + b"\n")


def checksum(fields: dict[str, Any]) -> str:
    """CRC-32 of the header's fields, which stands beside them."""
    return f"{zlib.crc32(json.dumps(fields).encode()):08x}"


def check_targets(targets: Any) -> tuple[str, ...]:
    """Names of targets as a tuple.

    Raises:
        InputError: A name that is empty, repeated, or no valid text.
    """
    if isinstance(targets, str):
        raise InputError(f"targets must be a list of names, not the single string {targets!r}")
    names = tuple(targets)
    for name in names:
        if not isinstance(name, str) or not name or not _is_text(name):
            raise InputError(f"target {name!r} is no name: use a string that is not empty")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"target {twice[0]!r} is named twice: give every target its own name")
    return names


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_header(folder: Path) -> Header:
    """Read and check `run.json`.

    Raises:
        StoreError: No run folder, a damaged header, or a format that is newer than this version of assay.
        UnreadableError: The header cannot be read just now.
    """
    path = folder / NAME
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.exists(folder):
            raise StoreError(f"there is no folder {folder}: name the out= of a run") from error
        raise StoreError(
            f"{folder} is not a run folder (it has no {NAME}): name the out= of a run"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "no valid JSON") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise StoreError(f"{path} is not that of a run (no format {FORMAT!r}): name the out= of a run")
    version = fields.get("version")
    if isinstance(version, int) and version > VERSION:
        raise NewerFormatError(folder, version, VERSION)
    if fields.pop("crc32", None) != checksum(fields):
        raise damaged(path, "its content does not match its checksum")
    try:
        return _parse(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"bad field: {error}") from error


def _parse(fields: dict[str, Any]) -> Header:
    if type(fields["version"]) is not int or fields["version"] < 1:
        raise ValueError("version")
    if not isinstance(fields["targets"], list):
        raise TypeError("targets")
    if fields["ids"] not in (None, *get_args(IdKind)):
        raise ValueError("ids")
    if not isinstance(fields["info"], dict):
        raise TypeError("info")
    parts = fields["parts"]
    if parts is not None and not (isinstance(parts, dict) and all(type(n) is int for n in parts.values())):
        raise TypeError("parts")
    cuts = tuple(Cut(**cut) for cut in fields.get("cuts", ()))
    if not all(type(n) is int for cut in cuts for n in (cut.step, *cut.parts.values())):
        raise TypeError("cuts")
    return Header(check_targets(fields["targets"]), fields["ids"], fields["info"], parts, cuts)
