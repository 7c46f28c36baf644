"""Values by token in the texts of the report."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from assay.errors import InputError
from assay.report import write
from assay.train import Config, train
from tests.corpus import write_documents


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokens")
    write_documents(folder / "texts.jsonl", 40, 60, {3: "Ünd <b>über</b> & 日本語 so."})
    config = {
        "out": folder / "run",
        "data": {"path": folder / "texts.jsonl", "id": "id", "long": "cut"},
        "model": {"vocabulary": 300, "context": 32, "layers": 1, "heads": 2, "width": 16},
        "targets": {"documents": 4},
        "train": {"batch_size": 8, "learning_rate": 3e-3},
        "attribution": {"measure_every": 0, "granularity": "token"},
    }
    return train(Config.model_validate(config))


def test_pieces_are_the_text_as_far_as_it_was_seen(result: Any) -> None:
    for id_, text, pieces in result.ledger.metadata().select("id", "text", "pieces").iter_rows():
        assert pieces[0] == ""  # the mark of the start
        assert text.startswith("".join(pieces))
        tokens = result.ledger.tokens(id=id_).filter(pl.col("token").is_not_null())
        assert len(pieces) <= tokens.height <= 32
        assert len(pieces) == 32 or "".join(pieces) == text


def test_the_report_colours_each_token_by_its_value(result: Any, tmp_path: Path) -> None:
    page = write(result.ledger, tmp_path / "report.html").read_text(encoding="utf-8")
    best = result.ledger.values()["id"][0]
    tokens = result.ledger.tokens(id=best).filter(pl.col("token").is_not_null())["value"].to_list()
    pieces = result.ledger.metadata().filter(id=best)["pieces"].item().to_list()
    shown = re.findall(r'<pre tabindex="0" class="tokens">(.*?)</pre>', page, flags=re.S)
    negative = int((result.ledger.values()["value"] < 0).sum())
    assert len(shown) == 10 + min(10, negative)  # both ends
    spans = re.findall(
        r'<span data-sign="(-?1)" style="--depth:([\d.]+)%" title="(.*?)">(.*?)</span>', shown[0], re.S
    )
    assert [unescape(text) for *_, text in spans] == [piece or "▸" for piece in pieces]
    largest = max(map(abs, tokens))
    for (sign, depth, _, _), value in zip(spans, tokens, strict=False):
        assert float(depth) == pytest.approx(100 * abs(value) / largest, abs=0.051)
        assert float(depth) == 0 or (sign == "1") == (value > 0)
    assert "<b>über" not in page


def test_a_position_must_be_one_token() -> None:
    with pytest.raises(ValueError, match="cut"):
        Config.model_validate({"out": "o", "data": {"path": "p"}, "attribution": {"granularity": "token"}})
    assert issubclass(InputError, ValueError)
