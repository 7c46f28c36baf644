"""Small inputs that several tests of the training command share."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from assay.demo import CORPUS


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of the corpus as JSON lines, about 100 characters each."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = pl.read_parquet(CORPUS).head(60).with_columns(pl.col("text").str.slice(0, 100)).to_dicts()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with dropout, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["to be or not to be"], 300, special_tokens=["<|end|>"], show_progress=False)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(wrapped),
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
