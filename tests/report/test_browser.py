"""The page in a real browser: quiet, offline, and everything on it works."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pytest

from assay.report import write
from assay.store import RunWriter

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.slow,
]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(ledger, tmp_path_factory):
    return write(ledger, tmp_path_factory.mktemp("browser") / "report.html").as_uri()


@pytest.fixture
def visit(browser):
    """Open a page; at the end it must have said nothing on the console and asked for nothing but itself."""
    contexts, noise = [], []

    def visit(url, viewport=DESKTOP, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: noise.append(request.url) if leaves(request.url, url) else None)
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert noise == []


def leaves(request, url):
    """Whether a request is for anything but the page or what it made itself."""
    return request.split("#")[0] != url and not request.startswith(("blob:", "data:"))


def scroll_through(page):
    page.evaluate(
        """async () => {
            for (let y = 0; y < document.body.scrollHeight; y += 600) {
                window.scrollTo({ top: y, behavior: "instant" });
                await new Promise((resolve) => setTimeout(resolve, 50));
            }
        }"""
    )


def column(table, index):
    return table.locator(f"tbody tr:not([hidden]) > :nth-child({index + 1})").all_inner_texts()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_and_the_page_never_scrolls_sideways(visit, url, viewport, scheme):
    page = visit(url, viewport, scheme)
    scroll_through(page)
    for tab in page.get_by_role("tab").all():
        tab.click()
    scroll_through(page)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.plot')].every((p) => !p.offsetParent || p.querySelector('svg.main-svg'))"
    )
    assert page.locator(".plot svg.main-svg").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    for plot in page.locator(".plot:visible").all():
        assert plot.locator("path").count() > 5


def test_a_figure_is_saved_as_a_picture_and_nothing_else_is_offered(visit, url):
    page = visit(url)
    scroll_through(page)
    plot = page.locator("#time-running .plot").first
    plot.hover()
    assert plot.locator(".modebar-btn").count() == 2
    with page.expect_download() as download:
        plot.locator(".modebar-btn").first.click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_theme_follows_the_system_until_it_is_chosen(visit, url):
    page = visit(url, scheme="dark")
    brightness = "() => parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert page.evaluate(brightness) < 60
    scroll_through(page)
    trace = page.locator("#time-running .plot path.js-line").first
    before = trace.evaluate("(path) => path.style.stroke")
    page.get_by_role("button", name="Light page").click()
    assert page.evaluate(brightness) > 200
    assert trace.evaluate("(path) => path.style.stroke") != before
    page.get_by_role("button", name="Dark page").click()
    assert page.evaluate(brightness) < 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrasts_with_its_ground(visit, url, scheme):
    page = visit(url, scheme=scheme)
    low = page.evaluate(
        """() => {
            const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            const rgba = (colour) => {
                canvas.clearRect(0, 0, 1, 1);
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                return canvas.getImageData(0, 0, 1, 1).data;
            };
            const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
                .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const ground = (node) => {
                const colour = rgba(getComputedStyle(node).backgroundColor);
                return colour[3] === 255 || !node.parentElement ? colour : ground(node.parentElement);
            };
            document.querySelectorAll("details").forEach((details) => { details.open = true; });
            const texts = [...document.querySelectorAll("main *, nav *")].filter((node) => node.offsetParent
                && !node.closest(".plot, :disabled, [aria-hidden]")
                && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
            return texts.map((node) => {
                const [a, b] = [light(rgba(getComputedStyle(node).color)), light(ground(node))];
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 120)];
            }).filter(([contrast]) => contrast < 4.5);
        }"""
    )
    assert low == []


def test_a_table_sorts_by_numbers_and_by_words(visit, url, ledger):
    table = visit(url).locator("#matrix-1 table")
    values = dict(
        ledger.by("domain", "code").select(pl.col("domain").fill_null("(none)"), "value").iter_rows()
    )
    by_value = sorted(values, key=values.__getitem__)
    header = table.get_by_role("columnheader", name="code")
    header.get_by_role("button").click()
    assert column(table, 0) == by_value[::-1]
    assert header.get_attribute("aria-sort") == "descending"
    header.get_by_role("button").click()
    assert column(table, 0) == by_value
    table.get_by_role("columnheader", name="domain").get_by_role("button").click()
    assert column(table, 0) == sorted(values)
    assert header.get_attribute("aria-sort") is None


def test_a_table_filters_and_leafs(visit, url, ledger):
    page = visit(url)
    box = page.locator("#samples .tablebox")
    table, status = box.locator("table"), box.get_by_role("status")
    count = ledger.values("code").height
    assert status.inner_text() == f"1–15 of {count}"
    assert box.get_by_role("button", name="Previous page").is_disabled()
    first = column(table, 0)
    box.get_by_role("button", name="Next page").click()
    assert status.inner_text() == f"16–30 of {count}"
    assert set(column(table, 0)).isdisjoint(first)

    wanted = ledger.metadata().filter(domain="poems")["id"].to_list()
    wanted = [identity for identity in wanted if identity in ledger.values("code")["id"].to_list()]
    box.get_by_role("searchbox").fill("POEMS doc")
    assert sorted(column(table, 0)) == sorted(wanted)
    assert status.inner_text() == f"1–{len(wanted)} of {len(wanted)}"
    table.get_by_role("columnheader", name="law").get_by_role("button").click()
    worth = dict(ledger.values("law").select("id", "value").iter_rows())
    assert column(table, 0) == sorted(wanted, key=worth.__getitem__, reverse=True)
    box.get_by_role("searchbox").fill("no such words")
    assert status.inner_text() == "no match"
    assert column(table, 0) == []


def test_tabs_work_with_mouse_and_keyboard(visit, url):
    page = visit(url)
    assert page.locator("#matrix-1").is_visible()
    assert page.locator("#matrix-2").is_hidden()
    page.get_by_role("tab", name="Total value").press("ArrowRight")
    assert page.locator("#matrix-1").is_hidden()
    assert page.locator("#matrix-2").is_visible()
    assert page.evaluate("document.activeElement.textContent") == "Value per document"
    page.get_by_role("tab", name="By stage").click()
    page.wait_for_selector("#time-stages svg.main-svg")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_link_jumps(visit, url, viewport):
    page = visit(url, viewport)
    page.emulate_media(reduced_motion="reduce")
    scroll_through(page)
    for anchor in page.eval_on_selector_all("nav a", "(links) => links.map((link) => link.hash)"):
        page.evaluate("window.scrollTo(0, 0)")
        if viewport is PHONE:
            page.get_by_text("Contents", exact=True).click()
        page.locator(f"nav a[href='{anchor}']").click()
        page.wait_for_function(
            """(anchor) => {
                const { top } = document.querySelector(anchor).getBoundingClientRect();
                const end = scrollY + innerHeight >= document.documentElement.scrollHeight - 2;
                return top > -5 && (top < 100 || end && top < innerHeight);
            }""",
            arg=anchor,
        )
        assert page.locator(anchor).is_visible()


def test_a_document_opens_with_the_keyboard(visit, url, ledger):
    page = visit(url)
    summary = page.locator("#target-0 .documents summary").first
    summary.focus()
    summary.press("Enter")
    best = ledger.values("code")["id"][0]
    inside = page.locator("#target-0 .documents details[open]")
    assert best in inside.inner_text()
    assert "by step" in inside.inner_text()


def test_hostile_texts_do_nothing(visit, attacks, tmp_path):
    count = len(attacks)
    writer = RunWriter(None, attacks[:3], {"config": {attack: attack for attack in attacks}})
    for step in range(3):
        writer.add_values(step, 0, attacks, np.linspace(-1, 1, 3 * count).reshape(count, 3))
        for target in attacks[:3]:
            writer.add_account(step, target, 1.0, 0.0, 0.0, 1.0, 0.0)
    domains = [attacks[i // 3] for i in range(count)]
    writer.add_metadata(pl.DataFrame({"id": attacks, "domain": domains, "text": attacks}))
    writer.add_table("curve", pl.DataFrame({"step": [0, 1, 2], attacks[0]: [1.0, 2.0, 1.5]}))
    page = visit(write(writer.ledger, tmp_path / "hostile.html", title=attacks[1]).as_uri())
    scroll_through(page)
    for tab in page.get_by_role("tab").all():
        tab.click()
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    page.locator("#time-stages .plot").first.hover()
    scroll_through(page)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, .plot a").count() == 0
    assert page.locator("h1").inner_text() == attacks[1]
    assert page.locator("#target-0 .documents pre").first.text_content() in attacks


def test_injected_script_and_requests_are_refused_by_the_policy(browser, url):
    """Were the escaping to fail one day, the policy would still hold."""
    context = browser.new_context()
    page, arrived, refused = context.new_page(), [], []
    page.goto(url)
    page.on("requestfinished", lambda request: arrived.append(request.url))
    page.on("requestfailed", lambda request: refused.append(request.failure))
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            const image = "<img src='https://example.org/x.png' onerror='window.hacked = 1'>";
            document.body.insertAdjacentHTML("beforeend", image);
        }"""
    )
    assert page.evaluate("fetch('https://example.org/').then(() => false, () => true)")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert arrived == []
    assert refused
    assert set(refused) == {"csp"}
    context.close()
