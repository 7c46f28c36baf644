"""Pictures of a report and of the explorer for the documentation, by headless Chromium.

    python scripts/screenshots.py runs/demo --out docs/images

Needs playwright, Pillow and a Chromium on the path; the run is one of `assay demo`, indexed if it is not yet.
"""

from __future__ import annotations

import argparse
import io
import shutil
import threading
from pathlib import Path
from typing import Any

import assay
from assay.report import write
from assay.serve import make_app, make_searcher

DESKTOP, PHONE = (1280, 860), (390, 844)
QUERY = "def read(self, size=-1):\n    with self._lock:\n        return self.buffer.read(size)"


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    ledger = assay.open(options.run)
    report = write(ledger).resolve().as_uri()
    address = _serve(ledger)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scheme in ("light", "dark"):
            for name, (width, height) in (("desktop", DESKTOP), ("phone", PHONE)):
                page = _open(browser, report, width, height, scheme)
                for part, anchor in (("", "#top"), ("-target", "#target-2"), ("-account", "#account")):
                    _look_at(page, anchor)
                    _save(page.screenshot(), options.out / f"report{part}-{name}-{scheme}.webp")
        page = _open(browser, address, *DESKTOP, "light")
        page.fill("#text", QUERY)
        page.click("#ask")
        page.wait_for_selector("#answers .item", timeout=120_000)
        _save(page.screenshot(), options.out / "explorer.webp")
        page.click("#answers .item")
        page.wait_for_selector("dialog[open]")
        _save(page.screenshot(), options.out / "explorer-document.webp")
        page = _open(browser, address, *PHONE, "dark")
        page.wait_for_selector("#documents .item")
        _save(page.screenshot(), options.out / "explorer-phone.webp")
        browser.close()


def _open(browser: Any, url: str, width: int, height: int, scheme: str) -> Any:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    return page


def _look_at(page: Any, anchor: str) -> None:
    """Scroll there and let the figures in view be drawn."""
    page.evaluate("(a) => document.querySelector(a).scrollIntoView({ behavior: 'instant' })", anchor)
    page.wait_for_timeout(1500)
    page.evaluate("(a) => document.querySelector(a).scrollIntoView({ behavior: 'instant' })", anchor)
    page.wait_for_timeout(500)


def _save(png: bytes, path: Path) -> None:
    from PIL import Image

    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=80, method=6)


def _serve(ledger: assay.Ledger) -> str:
    import uvicorn

    app = make_app(ledger, make_searcher(ledger, build=True))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


if __name__ == "__main__":
    main()
