"""The embedded corpus is what its data card says, and the script still makes it the same way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from assay.demo import CORPUS

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_corpus.py"


@pytest.fixture(scope="module")
def corpus() -> pl.DataFrame:
    return pl.read_parquet(CORPUS)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_document_is_named_and_unique(corpus: pl.DataFrame) -> None:
    assert corpus.columns == ["id", "domain", "source", "license", "text"]
    assert corpus.null_count().sum_horizontal().item() == 0
    assert corpus["id"].is_unique().all()
    assert corpus["text"].is_unique().all()
    assert corpus["text"].str.len_chars().is_between(300, 1_000).all()


def test_domains_are_balanced_and_free(corpus: pl.DataFrame) -> None:
    assert set(corpus["license"]) == {"public domain", "CC0", "BSD-3-Clause", "PSF-2.0"}
    characters = corpus.group_by("domain").agg(pl.col("text").str.len_chars().sum())["text"]
    assert len(characters) == 7
    assert characters.max() / characters.min() < 1.01
    assert 1.4e6 < characters.sum() < 1.6e6


def test_any_beginning_of_the_corpus_holds_every_domain(corpus: pl.DataFrame) -> None:
    counts = corpus.head(200)["domain"].value_counts()["count"]
    assert len(counts) == 7
    assert counts.min() >= 10


def test_the_data_card_counts_this_corpus(corpus: pl.DataFrame, script: ModuleType) -> None:
    card = CORPUS.with_name("DATA_CARD.md").read_text(encoding="utf-8")
    assert script.table(corpus) in card


def test_selection_needs_nothing_but_the_pieces(script: ModuleType) -> None:
    pieces = pl.DataFrame(
        {
            "id": [f"{n}" for n in range(40)],
            "domain": ["a", "b"] * 20,
            "source": ["s"] * 40,
            "license": ["CC0"] * 36 + ["CC-BY-SA-3.0"] * 4,
            "text": [f"{n:04} " * 150 for n in range(38)] + ["short", "0000 " * 150],
        }
    )
    selected = script.select(pieces)
    assert selected.equals(script.select(pieces.sample(fraction=1, shuffle=True, seed=1)))
    assert set(selected["license"]) == {"CC0"}
    assert selected.height == 36


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("x" * 500, "x" * 500),
        ("a" * 600 + "\n\n" + "b" * 600, "a" * 600),
        ("a" * 300 + "\n\n" + "b" * 400 + "\n" + "c" * 600, "a" * 300 + "\n\n" + "b" * 400),
        ("One. " * 300, ("One. " * 199).rstrip()),
        ("x" * 2_000, "x" * 1_000),
    ],
)
def test_documents_end_at_a_boundary(script: ModuleType, text: str, end: str) -> None:
    assert script.shorten(text) == end
