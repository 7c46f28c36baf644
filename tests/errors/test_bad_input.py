"""Every error of assay's own stands on the page with a message that was drawn from it, in one line."""

from __future__ import annotations

from errors.page import PAGE, RESULTS, page, read
from errors.sites import sites

ROWS = read(RESULTS)
SILENT = 101  # places from which no test that was recorded draws a message; this number may only fall


def test_the_page_is_made_from_the_messages() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(ROWS), "run python scripts/bad_input.py --page-only"


def test_every_place_that_raises_has_its_entry() -> None:
    entries = {(row["where"], row["form"]) for row in ROWS}
    places = {(site.where, site.form) for site in sites()}
    assert not places - entries, "provoke these in a test, then run python scripts/bad_input.py with it"
    assert not entries - places, "these are gone: run python scripts/bad_input.py --page-only"


def test_hardly_any_place_is_silent() -> None:
    silent = [row["where"] for row in ROWS if not row["message"]]
    assert len(silent) <= SILENT, silent


def test_every_message_is_one_line() -> None:
    for row in ROWS:
        assert "\n" not in row["message"], row
        assert not row["message"] or len(row["message"]) > 20, row
