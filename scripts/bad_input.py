"""Provoke every error of assay's own by the tests, and write docs/bad-input.md.

    python scripts/bad_input.py [PYTEST ARGUMENTS ...]

The tests run with a plugin that notes one message of every place in the source that raises such an error
(tests/errors/recorder.py). What is noted joins experiments/results/bad_input.jsonl, so that a part of the tests can be
run alone; a message whose place is gone or says something else by now is left out, and a place from which no test drew
a message stands there without one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from errors.page import PAGE, RESULTS, Row, page, read  # noqa: E402
from errors.sites import sites  # noqa: E402


def main() -> None:
    """Run the tests, keep what they drew, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="provoke nothing")
    options, given = parser.parse_known_args()
    found: list[Row] = [] if options.page_only else _provoked(given)
    rows = _merged(found, read(RESULTS) if RESULTS.exists() else [])
    RESULTS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


def _provoked(arguments: list[str]) -> list[Row]:
    """What the tests drew; a test that fails is not the concern of this command."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "errors.jsonl"
        plugin = ["-p", "errors.recorder", "--record-errors", str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *_paths()])}
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *plugin, *arguments],
            cwd=ROOT,
            env=environment,
            check=False,
        )
        return [row for part in sorted(Path(folder).glob("errors.jsonl*")) for row in read(part)]


def _paths() -> list[str]:
    known = os.environ.get("PYTHONPATH")
    return [known] if known else []


def _merged(found: Iterable[Row], known: Iterable[Row]) -> list[Row]:
    """One row for each place: what was found now, else what was known, in the order of the source."""
    rows: dict[tuple[str, str], Row] = {}
    for row in [*known, *sorted(found, key=lambda row: (-len(row["message"]), row["test"]))]:
        rows[row["where"], row["form"]] = row
    silent = {"error": "", "message": "", "test": ""}
    return [
        rows.get((site.where, site.form), {"where": site.where, "form": site.form, **silent})
        for site in sites()
    ]


if __name__ == "__main__":
    main()
