"""A plugin for pytest: notes one message of every place that raises an error of assay's own, and its test.

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

TESTS = Path(__file__).parents[1]
VARIABLE = "ASSAY_TESTS_RECORD_ERRORS"
FOLDERS = re.compile(
    r"(/private)?/(tmp|var)/[^\s'\":,;)]*?(pytest-\d+(/popen-gw\d+)?/[^/\s'\":,;)]+|tmp[a-z0-9_]{8})"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-errors", type=Path, help="where to note the errors that the tests provoke")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record-errors")
    if path is not None:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        os.environ[VARIABLE] = str(path)
        config.pluginmanager.register(Recorder(path.with_name(path.name + worker)))


def follow() -> None:
    """Note the errors of this process too, if the pytest that started it does; for processes that end abruptly."""
    if VARIABLE in os.environ:
        path = Path(os.environ[VARIABLE])
        Recorder(path.with_name(f"{path.name}-{os.getpid()}"), started_by_a_test=True)


class Recorder:
    """Notes errors where they are made; of each place the shortest message."""

    def __init__(self, path: Path, started_by_a_test: bool = False) -> None:
        import assay.errors

        self.path, self.inside = path, started_by_a_test
        self.rows: dict[tuple[str, str], dict[str, str]] = {}
        note = self.note

        def made(error: assay.errors.AssayError, *args: Any) -> None:
            super(assay.errors.AssayError, error).__init__(*args)
            note(type(error).__name__, str(args[0]) if args else "")

        assay.errors.AssayError.__init__ = made  # type: ignore[method-assign]

    def note(self, error: str, message: str) -> None:
        frames, test = self._frames()
        for site in sites():
            if site.matches(frames, message):
                row = {
                    "where": site.where,
                    "form": site.form,
                    "error": error,
                    "message": plain(message),
                    "test": test,
                }
                known = self.rows.get((site.where, site.form))
                if known is None or (len(row["message"]), test) < (len(known["message"]), known["test"]):
                    self.rows[site.where, site.form] = row
        if self.inside:
            self.save("w")

    def _frames(self) -> tuple[list[str], str]:
        """The functions of assay that an error comes from, innermost first, and the test."""
        frames: list[str] = []
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        frame = sys._getframe(3)
        left = False
        while frame is not None:
            file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
            named = name == "<module>" or not name.startswith("<")
            if file.is_relative_to(SOURCE) and not left:
                frames += [f"{file.relative_to(SOURCE).as_posix()} {name}"] if named else []
            elif frames:
                left = True
                if not self.inside:
                    break
                if named and file.is_relative_to(TESTS):
                    return frames[:5], f"{file.relative_to(TESTS.parent).as_posix()}::{name}"
            frame = frame.f_back  # type: ignore[assignment]
        return frames[:5], test

    def pytest_sessionfinish(self) -> None:
        self.save("a")

    def save(self, mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())


def plain(message: str) -> str:
    """The message without the names of temporary folders and the addresses of objects."""
    message = FOLDERS.sub("/runs", message).replace(str(SOURCE.parents[1]), "")
    return re.sub(r" at 0x[0-9a-f]+", "", message)
