"""The file that `write` makes: complete, self-contained, right in its numbers, safe with any text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import time
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from assay.errors import AssayError, InputError, StoreError
from assay.report import write
from assay.store import RunWriter, open_ledger


class Page(HTMLParser):
    """Elements of a page: (tag, attributes), scripts by their text, tables as rows of (text, attributes)."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tables: dict[str, list[list[tuple[str, dict[str, str | None]]]]] = {}
        self.text = ""
        self._in_script = False
        self._caption: str | None = None
        self._cell: list | None = None
        self._rows: list = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._in_script = tag == "script"
        if tag == "script":
            self.scripts.append((attributes, ""))
        elif tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(["", attributes])
            self._cell = self._rows[-1][-1]
        elif tag == "caption":
            self._caption = ""

    def handle_endtag(self, tag):
        self._in_script = False
        if tag in ("td", "th"):
            self._cell = None
        elif tag == "caption":
            self.tables[self._caption] = self._rows
            self._caption = None

    def handle_data(self, data):
        if self._in_script:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
            return
        if self._caption is not None:
            self._caption += data
        if self._cell is not None:
            self._cell[0] += data
        self.text += data

    def table(self, start):
        return next(rows for caption, rows in self.tables.items() if caption.startswith(start))


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(ledger, tmp_path_factory) -> Page:
    return read(write(ledger, tmp_path_factory.mktemp("page") / "page.html", title="A & B"))


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in page.elements:
        assert "src" not in attributes
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    allowed = re.search(r"script-src ([^;]*)", policy).group(1).split()
    digests = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for attributes, text in page.scripts
        if attributes.get("type") is None
    ]
    assert digests == allowed
    assert len(page.scripts) == 3
    style = " ".join(text for text in re.findall(r"url\([^)]*\)|@import[^;]*", page.text))
    assert style == ""


def test_every_link_leads_to_a_section(page):
    anchors = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    links = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
    assert links <= set(anchors)
    assert {"matrix", "time", "target-0", "target-1", "account", "groups", "samples", "training"} <= links
    assert {"coverage", "cost", "made"} <= links


def test_the_first_thing_said_is_what_the_number_means(page):
    meaning = " ".join(page.text.split())
    assert "lowered (+)" in meaning
    assert "raised (−)" in meaning
    assert "not what retraining without it would change" in meaning
    assert "A & B" in meaning


def test_every_table_has_a_caption_and_every_figure_its_data(page):
    assert len(page.tables) == sum(tag == "table" for tag, _ in page.elements)
    figures = json.loads(next(text for attributes, text in page.scripts if attributes.get("id") == "figures"))
    wanted = [attributes["data-figure"] for _, attributes in page.elements if "data-figure" in attributes]
    assert sorted(figures) == sorted(wanted)
    assert len(wanted) == 2 * 4 + 2
    assert all(figure["data"] for figure in figures.values())


def test_the_training_curve_is_the_logged_one(page):
    figures = json.loads(next(text for attributes, text in page.scripts if attributes.get("id") == "figures"))
    trace = figures["curve-0"]["data"][0]
    x, y = (_numbers(trace[axis]) for axis in "xy")
    assert x == list(range(1, 61))
    assert y == pytest.approx(np.linspace(5.0, 3.0, 60).tolist())


def _numbers(array):
    """Numbers of a trace, which plotly sends as a list or as base64 of their bytes."""
    if isinstance(array, list):
        return array
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).tolist()


@pytest.mark.parametrize(
    ("caption", "key"),
    [("Total value", "value"), ("Value per document", "mean"), ("Share negative", "negative")],
)
def test_the_matrix_holds_the_ledgers_numbers(page, ledger, caption, key):
    header, *rows = page.table(caption)
    assert [text for text, _ in header] == ["domain", "documents", "code", "law"]
    for column, target in ((2, "code"), (3, "law")):
        wanted = {row["domain"]: row for row in ledger.by("domain", target).iter_rows(named=True)}
        assert len(rows) == len(wanted) == 10  # nine domains and the sample without metadata
        for cells in rows:
            row = wanted[None if cells[0][0] == "(none)" else cells[0][0]]
            assert int(cells[1][0]) == row["samples"]
            assert float(cells[column][1]["data-order"]) == pytest.approx(row[key], abs=1e-15)


@pytest.mark.parametrize(
    ("start", "unit", "factor"), [("Total", "loss units", 1), ("Value per", "10⁻³ loss", 1e3)]
)
def test_written_numbers_are_the_sorted_ones_rounded(page, start, unit, factor):
    caption = next(caption for caption in page.tables if caption.startswith(start))
    assert f"in {unit}" in caption
    for cells in page.tables[caption][1:]:
        for text, attributes in cells[2:]:
            number = float(text.replace("−", "-"))
            assert number == pytest.approx(float(attributes["data-order"]) * factor, abs=0.0051)


def test_the_account_table_adds_up(page, ledger):
    _, *rows = page.table("The account")
    for cells, target in zip(rows, ("code", "law"), strict=True):
        name, *numbers, explained = (float(a["data-order"]) if "data-order" in a else t for t, a in cells)
        predicted, carried, decayed, actual, residual = numbers
        assert name == target
        assert predicted + carried + decayed + residual == pytest.approx(actual)
        assert explained == pytest.approx(ledger.explained(target))
    assert "1 of 60 steps had a number that is not finite" in page.text


def test_documents_at_both_ends_come_in_order_with_their_text(page, ledger):
    values = ledger.values("law")
    texts = dict(ledger.metadata().select("id", "text").iter_rows())
    start = page.text.index("Target: law", page.text.index("Target: law") + 5)
    section = page.text[start:]
    helpful, harmful = values.head(10)["id"].to_list(), values.tail(10)["id"].to_list()[::-1]
    places = [section.index(texts.get(identity) or identity) for identity in helpful]
    assert places == sorted(places)
    harm = section.index("Most harmful")
    places = [section.index(texts.get(identity) or identity, harm) for identity in harmful]
    assert places == sorted(places)


def test_all_samples_of_a_small_run_are_listed(page, ledger):
    values = dict(ledger.values("code").select("id", "value").iter_rows())
    header, *rows = page.table(f"All {len(values)} documents")
    assert [text for text, _ in header][:2] == ["id", "domain"]
    found = {cells[0][0]: float(cells[2][1]["data-order"]) for cells in rows}
    assert found == pytest.approx(values)


def test_hostile_texts_stay_texts(make_ledger, attacks, tmp_path):
    count = len(attacks)
    writer = RunWriter(
        None, [f"target {attack}" for attack in attacks[:2]], {"config": {a: a for a in attacks}}
    )
    writer.add_values(0, 0, attacks, np.linspace(-1, 1, 2 * count).reshape(count, 2))
    writer.add_metadata(
        pl.DataFrame(
            {"id": attacks, "domain": [attacks[i // 3] for i in range(count)], "text": attacks}
        ).with_columns(pl.Series(attacks[2], ["<b>", "&amp;", "<i>"] * (count // 3)))
    )
    writer.add_account(0, f"target {attacks[0]}", 1.0, 0.0, 0.0, 1.0, 0.0)
    writer.add_table("curve", pl.DataFrame({"step": [0, 1], attacks[0]: [1.0, 2.0]}))
    writer.add_table("coverage", pl.DataFrame({attacks[1]: attacks, "status": "exact", "entries": 1}))
    plain = read(write(make_ledger(), tmp_path / "plain.html"))
    hostile = read(write(writer.ledger, tmp_path / "hostile.html", title=attacks[1]))
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in plain.elements}
    assert len(hostile.scripts) == len(plain.scripts) == 3
    names = {name for _, attributes in plain.elements for name in attributes}
    assert {name for _, attributes in hostile.elements for name in attributes} <= names
    for attack in attacks[:7]:
        assert hostile.text.count(attack) >= 3
    figures = next(text for attributes, text in hostile.scripts if attributes.get("id") == "figures")
    assert "<" not in figures
    # Plotly draws a subset of HTML: what comes from the data reaches it escaped.
    names = {trace.get("name", "") for figure in json.loads(figures).values() for trace in figure["data"]}
    assert not any("<" in name for name in names)
    assert any("&lt;script&gt;" in name for name in names)


def test_where_the_file_goes(ledger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write(ledger).resolve() == tmp_path / "report.html"
    (tmp_path / "folder").mkdir()
    assert write(ledger, tmp_path / "folder") == tmp_path / "folder" / "report.html"
    assert write(ledger, str(tmp_path / "other.html")).stat().st_size > 1e6
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_folder_is_where_its_report_goes(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(type(ledger), "path", tmp_path, raising=False)
    assert write(ledger) == tmp_path / "report.html"


def test_a_missing_folder_is_named(ledger, tmp_path):
    with pytest.raises(InputError, match=r"no folder .*nowhere.* make it first"):
        write(ledger, tmp_path / "nowhere" / "report.html")


def test_a_refused_write_keeps_the_old_file(ledger, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(StoreError, match="No space left"):
        write(ledger, path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("module", ["plotly", "jinja2"])
def test_a_missing_extra_is_named(ledger, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AssayError, match=rf"needs {module}: pip install 'assay\[report\]'"):
        write(ledger, tmp_path)


def test_a_run_without_anything_but_targets(tmp_path):
    page = read(write(RunWriter(None, ["code"]).ledger, tmp_path / "empty.html"))
    assert "All 0 samples" in page.tables
    assert "No sample lowered this loss." in page.text
    assert "was not measured" in page.text


def test_a_run_without_metadata_and_account(tmp_path):
    writer = RunWriter(None, ["code"])
    writer.add_values(3, 0, [7, 8, 9], np.array([[1.0], [2.0], [np.nan]]))
    page = read(write(writer.ledger, tmp_path / "bare.html"))
    assert "matrix" not in {attributes.get("id") for _, attributes in page.elements}
    _, *rows = page.table("All 3 samples")
    assert [[text for text, _ in row] for row in rows] == [
        ["8", "+2.000", "1"],
        ["7", "+1.000", "1"],
        ["9", "0.000", "1"],
    ]
    assert "No sample raised this loss." in page.text


def test_a_run_of_nothing_but_nan(tmp_path):
    writer = RunWriter(None, ["code"])
    writer.add_values(0, 0, ["a"], np.array([[np.nan]]))
    writer.add_account(0, "code", np.nan, 0.0, 0.0, np.nan, np.nan, "nan")
    writer.add_metadata(pl.DataFrame({"id": ["a"]}))
    page = read(write(writer.ledger, tmp_path / "nan.html"))
    assert "1 of 1 steps had a number that is not finite, so what they explain is unknown" in page.text
    assert "was not measured" not in page.text
    assert "NaN" not in page.text


def test_a_loss_that_rose_is_said_to_have_risen(tmp_path):
    writer = RunWriter(None, ["code"])
    writer.add_values(0, 0, ["a"], np.array([[-0.5]]))
    writer.add_account(0, "code", -0.5, 0.0, 0.0, -0.4, 0.1)
    page = read(write(writer.ledger, tmp_path / "rose.html"))
    assert "The loss did not fall: it rose by 0.400 loss units" in page.text


@pytest.mark.parametrize(
    ("residual", "said"), [(0.1, "10.0 % stay unexplained"), (-0.1, "10.0 % too much in all")]
)
def test_what_the_drop_is_made_up_of_is_said_in_words(tmp_path, residual, said):
    writer = RunWriter(None, ["code"])
    writer.add_values(0, 0, ["a"], np.array([[0.5]]))
    writer.add_account(0, "code", 0.5, 0.4 - residual, 0.1, 1.0, residual)
    page = read(write(writer.ledger, tmp_path / "split.html"))
    assert "50.0 % of that are the values of the samples" in page.text
    assert said in page.text


def test_more_groups_than_colours_are_summed_as_the_rest(make_ledger, tmp_path):
    page = read(write(make_ledger(), tmp_path / "many.html"))
    figures = json.loads(next(text for attributes, text in page.scripts if attributes.get("id") == "figures"))
    names = [trace["name"] for trace in figures["running-target-0"]["data"]]
    assert len(names) == 8
    assert names[-1] == "3 more"  # nine domains and the samples without one, seven apart


def test_a_long_text_is_cut_and_says_so(tmp_path):
    writer = RunWriter(None, ["code"])
    writer.add_values(0, 0, ["a"], np.array([[1.0]]))
    writer.add_metadata(pl.DataFrame({"id": ["a"], "text": ["x" * 9000 + "END"]}))
    page = read(write(writer.ledger, tmp_path / "long.html"))
    assert "first 4,000 of 9,003 characters" in page.text
    assert "END" not in page.text


def test_a_run_folder_reports_like_memory(make_ledger, tmp_path):
    make_ledger(out=tmp_path / "run")
    on_disk = read(write(open_ledger(tmp_path / "run"), tmp_path / "disk.html"))
    in_memory = read(write(make_ledger(), tmp_path / "memory.html"))
    assert on_disk.text == in_memory.text


@pytest.mark.slow
def test_a_million_samples_take_seconds_and_megabytes(tmp_path):
    samples, batch, targets = 1_000_000, 4000, ["code", "law"]
    rng = np.random.default_rng(0)
    writer = RunWriter(None, targets)
    ids = [f"shard-{i % 97:02d}/{i:07d}" for i in range(samples)]
    for step in range(samples // batch):
        values = rng.standard_t(3, (batch, 2)) * 1e-6
        writer.add_values(step, 0, ids[step * batch : (step + 1) * batch], values)
        for name, predicted in zip(targets, values.sum(0), strict=True):
            writer.add_account(step, name, predicted, 0.0, 0.0, predicted, 0.0)
    index = pl.int_range(samples, eager=True)
    writer.add_metadata(
        pl.DataFrame(
            {
                "id": ids,
                "domain": "domain " + (index % 22).cast(pl.String),
                "site": "site " + (index % 300_000).cast(pl.String),
                "text": "Some text of the document with the number " + index.cast(pl.String),
            }
        )
    )
    start = time.perf_counter()
    path = write(writer.ledger, tmp_path / "million.html")
    assert time.perf_counter() - start < 30
    assert path.stat().st_size < 15e6
    page = read(path)
    assert len(page.table("The 1,000 of 1,000,000 documents")) == 1001
    assert len(page.table("Value by site (the 500 largest of 300,000 groups)")) == 501
