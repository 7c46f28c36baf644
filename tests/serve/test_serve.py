"""The explorer: its answers against the ledger and the index, its headers, and a look in a browser."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import assay
from assay.demo import CORPUS
from assay.errors import InputError

testclient = pytest.importorskip("starlette.testclient")

from assay.serve import make_app, make_searcher  # noqa: E402
from assay.store import RunWriter  # noqa: E402
from tests.corpus import write_documents  # noqa: E402

ATTACK = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `assay train` with its index; one document tries to break out of the page."""
    from assay.train import Config, train

    folder = tmp_path_factory.mktemp("serve")
    first = pl.read_parquet(CORPUS)["text"][0][:120]
    write_documents(folder / "texts.jsonl", 50, 120, {0: ATTACK + first})
    config = {
        "out": folder / "run",
        "data": {"path": folder / "texts.jsonl", "id": "id"},
        "model": {"vocabulary": 300, "context": 32, "layers": 1, "heads": 2, "width": 16},
        "targets": {"by": "domain", "values": ["bible", "novels"], "documents": 2},
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3},
        "attribution": {"measure_every": 0},
    }
    train(Config.model_validate(config))
    make_searcher(assay.open(folder / "run"), build=True)
    return folder


@pytest.fixture(scope="module")
def ledger(folder: Path) -> assay.Ledger:
    return assay.open(folder / "run")


@pytest.fixture(scope="module")
def client(ledger: assay.Ledger) -> Any:
    return testclient.TestClient(make_app(ledger, make_searcher(ledger)), base_url="http://127.0.0.1:8765")


def test_every_answer_forbids_what_the_page_does_not_need(client: Any) -> None:
    for path in ("/", "/explorer.js", "/explorer.css", "/api/run", "/api/documents", "/nothing"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_only_this_machine_may_ask(client: Any) -> None:
    assert client.get("/api/run", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/api/run", headers={"host": "localhost:8765"}).status_code == 200
    # a page elsewhere cannot send JSON without asking first, and gets no leave
    assert (
        client.post("/api/search", content=b"{}", headers={"content-type": "text/plain"}).status_code == 400
    )


def test_pages_are_the_ledgers_values_in_order(client: Any, ledger: assay.Ledger) -> None:
    values = ledger.values("bible")
    found: list[Any] = []
    for page in range(3):
        answer = client.get("/api/documents", params={"target": "bible", "page": page}).json()
        assert answer["total"] == values.height
        found += answer["rows"]
    assert [(row["id"], row["value"], row["steps"]) for row in found] == values.rows()
    worst = client.get("/api/documents", params={"target": "bible", "order": "worst"}).json()["rows"]
    assert [row["id"] for row in worst] == values["id"].reverse().head(25).to_list()


def test_filters(client: Any, ledger: assay.Ledger) -> None:
    metadata = ledger.metadata()
    asked = {"target": "bible", "column": "domain", "group": "novels"}
    rows = client.get("/api/documents", params=asked).json()["rows"]
    assert {row["id"] for row in rows} == set(metadata.filter(domain="novels")["id"])
    rows = client.get("/api/documents", params={"target": "bible", "words": "WINDOW.hacked"}).json()["rows"]
    assert [row["text"][:4] for row in rows] == ["<img"]
    exported = client.get("/api/export", params={**asked, "drop": "negative"})
    kept = [json.loads(line) for line in exported.text.splitlines()]
    expected = (
        ledger.values("bible").filter(pl.col("value") >= 0).join(metadata.filter(domain="novels"), on="id")
    )
    assert {row["id"] for row in kept} == set(expected["id"])
    assert all(row["text"] for row in kept)
    assert "attachment" in exported.headers["content-disposition"]


def test_metadata_keep_their_names() -> None:
    writer = RunWriter(None, ["t"])
    writer.add_values(0, 0, ["a", "b", "c", "d"], np.array([[4.0], [3.0], [2.0], [1.0]]))
    taken = {"steps": [8, 9, 8, 9], "score": ["x", "y", "y", "x"], "value": [5, 6, 7, 8]}
    writer.add_metadata(pl.DataFrame({"id": ["a", "b", "c", "d"], **taken}))
    client = testclient.TestClient(make_app(writer.ledger), base_url="http://127.0.0.1:8765")
    row = client.get("/api/documents", params={"target": "t"}).json()["rows"][0]
    assert row == {"id": "a", "value": 4.0, "steps": 1, "text": "", "tags": {"steps": 8, "score": "x"}}
    first = json.loads(client.get("/api/export", params={"target": "t"}).text.splitlines()[0])
    assert (first["run_value"], first["run_steps"], first["value"], first["steps"]) == (4.0, 1, 5, 8)
    asked = {"target": "t", "column": "steps", "group": "9"}
    assert [r["id"] for r in client.get("/api/documents", params=asked).json()["rows"]] == ["b", "d"]


@pytest.mark.parametrize("page", ["9", "1" * 23, "9" * 5000])
def test_a_page_past_the_end_is_empty(client: Any, page: str) -> None:
    answer = client.get("/api/documents", params={"target": "bible", "page": page})
    assert answer.status_code == 200
    assert answer.json()["rows"] == []


def test_a_document_with_its_curve(client: Any, ledger: assay.Ledger) -> None:
    id_ = ledger.values("novels")["id"][3]
    found = client.get("/api/document", params={"id": id_}).json()
    assert found["text"] == ledger.metadata().filter(id=id_)["text"].item()
    for target in ledger.targets:
        steps = ledger.steps(target).filter(id=id_).group_by("step").agg(pl.col("value").sum()).sort("step")
        assert [point[0] for point in found["curves"][target]] == steps["step"].to_list()
        assert found["curves"][target][-1][1] == pytest.approx(found["values"][target])


def test_a_search_is_the_indexs_influence(client: Any, ledger: assay.Ledger, folder: Path) -> None:
    text = "And God said, Let there be light"
    answer = client.post("/api/search", json={"text": text, "target": "bible"}).json()
    searcher = make_searcher(ledger)
    assert searcher is not None
    batch = searcher.encode(text)
    scores = searcher.index.influence(searcher.model, [batch], searcher.loss)[0]
    by_id: dict[Any, float] = {}
    for id_, score in zip(searcher.index.ids, scores.tolist(), strict=True):
        by_id[id_] = by_id.get(id_, 0.0) + score
    best = sorted(by_id, key=lambda id_: -by_id[id_])[:20]
    assert [row["id"] for row in answer["rows"]] == best
    assert answer["rows"][0]["score"] == pytest.approx(by_id[best[0]], rel=1e-5)
    asked = {"text": text, "target": "bible", "column": "domain", "group": "novels", "order": "worst"}
    worst = client.post("/api/search", json=asked).json()["rows"]
    novels = set(ledger.metadata().filter(domain="novels")["id"])
    assert [row["id"] for row in worst] == sorted(novels & set(by_id), key=lambda id_: by_id[id_])[:20]


def test_a_document_stands_behind_its_own_text(client: Any, ledger: assay.Ledger) -> None:
    ranks = []
    for id_, text in ledger.metadata().select("id", "text").head(8).iter_rows():
        rows = client.post("/api/search", json={"text": text, "target": "bible"}).json()["rows"]
        ranks.append(next((k for k, row in enumerate(rows) if row["id"] == id_), 20))
    assert sorted(ranks)[4] <= 2  # the median of eight documents among forty-six


@pytest.mark.parametrize(
    ("method", "path", "arguments", "message"),
    [
        ("get", "/api/documents", {"params": {"target": "x"}}, "no target 'x'"),
        (
            "get",
            "/api/documents",
            {"params": {"target": "bible", "column": "x", "group": "y"}},
            "no column 'x'",
        ),
        ("get", "/api/document", {"params": {"id": "../../etc/passwd"}}, "no document"),
        ("post", "/api/search", {"json": {"text": " ", "target": "bible"}}, "no text"),
        ("post", "/api/search", {"json": [1]}, "no JSON object"),
        ("post", "/api/search", {"json": {"text": "x" * 200_000}}, "100,000"),
    ],
)
def test_what_cannot_be_answered_is_said(
    client: Any, method: str, path: str, arguments: Any, message: str
) -> None:
    answer = getattr(client, method)(path, **arguments)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_without_an_index(ledger: assay.Ledger, tmp_path: Path) -> None:
    client = testclient.TestClient(make_app(ledger), base_url="http://localhost")
    assert client.get("/api/run").json()["search"] is False
    answer = client.post("/api/search", json={"text": "x", "target": "bible"})
    assert "--build-index" in answer.json()["error"]
    with pytest.raises(InputError, match="no index"):
        make_searcher(ledger, tmp_path / "none")


def test_the_saved_model_is_the_trained_one(ledger: assay.Ledger) -> None:
    from assay.train import config_of
    from assay.train.model import load_model

    assert ledger.path is not None
    model, tokenizer = load_model(config_of(ledger)[0].model, ledger.path / "model")
    saved = torch.load(ledger.path / "model" / "weights.pt", weights_only=True)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, saved[name])
    assert tokenizer.encode(["to be"])[0][0] == tokenizer.start


# --- in a browser ---

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def address(ledger: assay.Ledger) -> Iterator[str]:
    uvicorn = pytest.importorskip("uvicorn")
    app = make_app(ledger, make_searcher(ledger))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(address: str, width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    noise: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#documents .item")
        page.fill("#words", "window.hacked")
        playwright.expect(page.locator("#documents .item")).to_have_count(1)
        page.click("#documents .item")
        page.wait_for_selector("dialog[open]")
        assert page.inner_text("#content").startswith("<img src=x")
        assert page.evaluate("window.hacked") is None
        page.click("#close")
        page.fill("#words", "")
        assert "words=&" in page.get_attribute("#export-positive", "href")  # at once, not with the list
        page.fill("#text", "And God said, Let there be light")
        page.click("#ask")
        page.wait_for_selector("#answers .item")
        assert page.locator("#answers .item").count() == 20
        assert page.evaluate("document.documentElement.scrollWidth") == width
        with page.expect_download() as download:
            page.click("#export-positive")
        assert len(Path(download.value.path()).read_text().splitlines()) > 3
        held: list[Any] = []
        page.route("**/api/documents?*words=window*", lambda route: held.append(route))
        page.fill("#words", "window.hacked")
        while not held:
            page.wait_for_timeout(20)
        with page.expect_response("**/api/documents?*words=God*"):
            page.fill("#words", "God")
        page.wait_for_timeout(100)
        shown = page.inner_text("#page")
        assert shown != "1–1 of 1"
        with page.expect_response("**/api/documents?*words=window*"):
            held[0].continue_()
        page.wait_for_timeout(100)
        assert page.inner_text("#page") == shown  # the answer to an older question comes too late
        browser.close()
    assert noise == []
