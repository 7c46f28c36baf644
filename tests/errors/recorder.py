"""A plugin for pytest that notes one message of every place that raises an error of assay's own, and the test it came from.

    pytest -p errors.recorder --record-errors FILE.jsonl
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from errors.sites import SOURCE, sites

FOLDERS = re.compile(r"(/private)?/(tmp|var)/[^\s'\":,;)]*?(pytest-\d+(/popen-gw\d+)?/[^/\s'\":,;)]+|tmp[a-z0-9_]{8})")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-errors", type=Path, help="where to note the errors that the tests provoke")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record-errors")
    if path is not None:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        config.pluginmanager.register(Recorder(path.with_name(path.name + worker)))


class Recorder:
    """Notes errors where they are made; of each place the shortest message."""

    def __init__(self, path: Path) -> None:
        import assay.errors

        self.path = path
        self.rows: dict[tuple[str, str], dict[str, str]] = {}
        note = self.note

        def made(error: assay.errors.AssayError, *args: Any) -> None:
            super(assay.errors.AssayError, error).__init__(*args)
            note(type(error).__name__, str(args[0]) if args else "")

        assay.errors.AssayError.__init__ = made  # type: ignore[method-assign]

    def note(self, error: str, message: str) -> None:
        frames, frame = [], sys._getframe(2)
        while frame is not None and len(frames) < 5:
            file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
            if file.is_relative_to(SOURCE):
                if name == "<module>" or not name.startswith("<"):
                    frames.append(f"{file.relative_to(SOURCE).as_posix()} {name}")
            elif frames:
                break
            frame = frame.f_back  # type: ignore[assignment]
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        for site in sites():
            if site.matches(frames, message):
                row = {"where": site.where, "form": site.form, "error": error, "message": plain(message), "test": test}
                known = self.rows.get((site.where, site.form))
                if known is None or (len(row["message"]), test) < (len(known["message"]), known["test"]):
                    self.rows[site.where, site.form] = row

    def pytest_sessionfinish(self) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())


def plain(message: str) -> str:
    """The message without the names of temporary folders and the addresses of objects."""
    message = FOLDERS.sub("/runs", message).replace(str(SOURCE.parents[1]), "")
    return re.sub(r" at 0x[0-9a-f]+", "", message)
