"""Files of tensors: whole or not there, with a checksum in the name, and read without running any code.

NAME-NUMBER-CRC32.pt       `torch.save` of dicts, lists, numbers, strings and tensors; `weights_only` on reading
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from assay.errors import StoreError
from assay.store.files import damaged, write_atomic, write_error

__all__ = ["TensorFiles", "snapshot_files"]

_FILE = re.compile(r"(.+)-(\d{9,})-([0-9a-f]{8})\.pt")


class TensorFiles:
    """Numbered contents under names, in a folder or in memory.

    One process writes a folder; others may read it meanwhile. `numbers` looks into the folder. Everything else goes by
    what was seen there last and written since, and looks again only where a file is not as expected: a folder that
    grows with the run is not listed at every write.

    Args:
        folder: made when the first file is written; None keeps everything in memory.

    Example:
        >>> files = TensorFiles(None)
        >>> files.write("state", 3, {"w": torch.ones(2)})
        8
        >>> files.numbers("state"), files.read("state", 3)
        ([3], {'w': tensor([1., 1.])})
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[tuple[str, int], Any] = {}
        self._files: dict[tuple[str, int], list[Path]] | None = None  # None: to be looked up
        self._lock = threading.RLock()  # a thread of the run's writes while another one asks

    def write(self, name: str, number: int, content: Any) -> int:
        """Store a content, in place of one under the same name and number; how many bytes it takes.

        Raises:
            StoreError: the disk refused; what was there before still is.
        """
        if self.folder is None:
            self._held[name, number] = content
            return tensor_bytes(content)
        file = BytesIO()
        torch.save(content, file)
        data = file.getbuffer()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        path = self.folder / f"{name}-{number:09d}-{zlib.crc32(data):08x}.pt"
        with self._lock:
            files = self._known()
            older = files.get((name, number), [])
            self._files = None  # until the write is known to have been done
            write_atomic(path, data)
            files[name, number] = [path]
            self._files = files
            _remove(file for file in older if file != path)
        return len(data)

    def read(self, name: str, number: int) -> Any:
        """The content.

        Raises:
            StoreError: it is not there, or damaged.
        """
        if self.folder is None:
            return self._held[name, number]
        path = self._path(name, number)
        if path is None:
            raise StoreError(f"{self.folder} has no {name} number {number}: put it back, or train anew")
        return torch.load(BytesIO(_verified(path)), map_location="cpu", weights_only=True)

    def numbers(self, name: str) -> list[int]:
        """The numbers that there are, sorted."""
        if self.folder is None:
            return sorted(number for held, number in self._held if held == name)
        with self._lock:
            self._files = None
            return sorted(number for held, number in self._known() if held == name)

    def delete(self, name: str, number: int) -> None:
        """Remove a content if it is there."""
        self._held.pop((name, number), None)
        if self.folder is not None:
            with self._lock:
                _remove(self._known().pop((name, number), []))

    def bytes(self) -> int:
        """What everything takes."""
        if self.folder is None:
            return sum(tensor_bytes(content) for content in self._held.values())
        return sum(p.stat().st_size for p in self.folder.glob("*.pt")) if self.folder.is_dir() else 0

    def damaged(self) -> Iterator[tuple[Path, StoreError]]:
        """Every file whose content does not match its name, and what is wrong."""
        for path in sorted(self.folder.glob("*.pt")) if self.folder is not None else []:
            if _FILE.fullmatch(path.name):
                try:
                    _verified(path)
                except StoreError as error:
                    yield path, error

    def _path(self, name: str, number: int) -> Path | None:
        """Where a content is; None if it is not there."""
        with self._lock:
            found = self._known().get((name, number), [])
            if not found or not found[-1].exists():  # another process has written it since, or anew
                self._files = None
                found = self._known().get((name, number), [])
            return found[-1] if found else None

    def _known(self) -> dict[tuple[str, int], list[Path]]:
        """The files of each content, the newest last: a killed writer may have left the one before it there."""
        if self._files is None:
            assert self.folder is not None
            self._files = {}
            for path in sorted(self.folder.glob("*.pt")):
                match = _FILE.fullmatch(path.name)
                if match:
                    self._files.setdefault((match[1], int(match[2])), []).append(path)
            for paths in self._files.values():
                if len(paths) > 1:
                    paths.sort(key=_written)
        return self._files


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _written(path: Path) -> int:
    """When, in nanoseconds; 0 if it is no longer there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _verified(path: Path) -> bytes:
    """A file's content; StoreError if it is not what the name says."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    if zlib.crc32(data) != int(path.stem.rsplit("-", 1)[1], 16):
        raise damaged(path, "its content does not match the checksum in its name")
    return data


def snapshot_files(run: Path | None) -> TensorFiles:
    """Where snapshots of a run are: below its folder, or in memory."""
    return TensorFiles(None if run is None else run / "snapshots")


def tensor_bytes(content: Any) -> int:
    """Bytes of the tensors in a content, with 40 for each other leaf."""
    leaves = torch.utils._pytree.tree_leaves(content)
    return sum(x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 40 for x in leaves)
