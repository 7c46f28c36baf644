"""The vocabulary is learned fast, the same every time, and loses nothing of the text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from assay.demo import CORPUS
from assay.errors import InputError
from assay.train import learn_tokenizer
from assay.train.tokenizer import pretrained_tokenizer

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return pl.read_parquet(CORPUS)["text"].head(300).to_list()


def test_text_survives_the_round_trip(texts: list[str], tmp_path: Path) -> None:
    tokenizer = learn_tokenizer(texts, 1024)
    assert tokenizer.size == 1024
    tokenizer.save(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    unseen = [*texts[:20], "naïve ☕ 漢字\n\ttabs", "<|end|> typed by a user"]
    for text, tokens in zip(unseen, tokenizer.encode(unseen), strict=True):
        assert tokens[0] == tokens[-1] == tokenizer.end
        assert saved.decode(tokens[1:-1], skip_special_tokens=False) == text


def test_a_small_corpus_gives_a_small_vocabulary() -> None:
    assert learn_tokenizer(["abc"], 1024).size < 270


def test_the_same_text_gives_the_same_vocabulary(texts: list[str], tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, polars; from assay.demo import CORPUS; from assay.train import learn_tokenizer;"
        "texts = polars.read_parquet(CORPUS)['text'].head(300).to_list();"
        "learn_tokenizer(texts, 1024).save(pathlib.Path(sys.argv[1]))"
    )
    learn_tokenizer(texts, 1024).save(tmp_path)
    here = (tmp_path / "tokenizer.json").read_bytes()
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == here


def test_a_pretrained_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"the tokenizer of .* cannot be loaded"):
        pretrained_tokenizer(str(tmp_path))
