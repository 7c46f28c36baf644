"""Where an adjoint stands, written after a segment, so that one that was killed goes on."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.replay.optimizers import Vectors
from assay.store.tensors import TensorFiles

__all__ = ["Progress", "ProgressFiles"]

STATE, VALUES = "adjoint", "values"
SHARE = 0.02  # of the time that may go into writing; segments that end sooner are written with a later one


@dataclass
class Progress:
    """An adjoint on its way back.

    Args:
        step: the next segment ends here.
        adjoints: of weights and buffers, `[queries, P]` each.
        values: by step, `[queries, rows]`.
    """

    step: int
    adjoints: Vectors
    values: dict[int, Tensor]


class ProgressFiles:
    """Keeps one adjoint's progress.

    Args:
        folder: None keeps nothing.
        settings: whatever the result depends on; progress of other settings is not taken up.
        start: the adjoints of the queries, which are settings too.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], start: Tensor) -> None:
        text = json.dumps(settings, sort_keys=True, default=str).encode()
        key = zlib.crc32(
            start.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), zlib.crc32(text)
        )
        self.files = None if folder is None else TensorFiles(folder / f"{key:08x}")
        self._fresh: list[int] = []  # steps whose values are not written
        self._due = 0.0

    def write(self, progress: Progress, fresh: Sequence[int]) -> None:
        """Keep the adjoints, and the values of the segment's steps, unless the last time is too near.

        Raises:
            StoreError: the disk refused.
        """
        if self.files is None:
            return
        self._fresh.extend(fresh)
        began = time.monotonic()
        if began < self._due:
            return
        self._write(self.files, progress)
        self._fresh.clear()
        ended = time.monotonic()
        self._due = ended + (ended - began) / SHARE

    def _write(self, files: TensorFiles, progress: Progress) -> None:
        files.write(VALUES, progress.step, {t: progress.values[t].cpu() for t in self._fresh})
        files.write(STATE, progress.step, {n: x.cpu() for n, x in progress.adjoints.items()})
        for number in files.numbers(STATE):
            if number != progress.step:
                files.delete(STATE, number)

    def read(self, device: torch.device) -> Progress | None:
        """What there is from an earlier attempt.

        Raises:
            StoreError: a file is damaged.
        """
        numbers = self.files.numbers(STATE) if self.files is not None else []
        if self.files is None or not numbers:
            return None
        step = numbers[0]
        adjoints = {n: x.to(device) for n, x in self.files.read(STATE, step).items()}
        values = {
            t: x for number in self.files.numbers(VALUES) if number >= step
            for t, x in self.files.read(VALUES, number).items()
        }  # fmt: skip
        return Progress(step, adjoints, values)

    def clear(self) -> None:
        """The result is there: remove what led to it."""
        for name in (STATE, VALUES):
            for number in self.files.numbers(name) if self.files is not None else ():
                assert self.files is not None
                self.files.delete(name, number)
        if self.files is not None and self.files.folder is not None and self.files.folder.is_dir():
            self.files.folder.rmdir()
