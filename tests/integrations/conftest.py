"""A tiny causal language model and real text, as columns, for every trainer."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from assay.demo import CORPUS

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """48 documents of unequal length: doc, domain, input_ids, attention_mask, labels; bytes are the tokens."""
    frame = pl.read_parquet(CORPUS).sample(48, seed=1)
    found = []
    for index, (id_, domain, text) in enumerate(frame.select("id", "domain", "text").iter_rows()):
        tokens = list(text.encode()[: 20 + index % 7])
        found.append({"doc": id_, "domain": domain, "input_ids": tokens, "labels": tokens})
    return found


@pytest.fixture
def data(rows: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(rows[:40])


@pytest.fixture
def held_out(rows: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(rows[40:])


@pytest.fixture
def make_model() -> Any:
    """A GPT-2 without dropout, in float32, the same one each time."""

    def make() -> Any:
        transformers.set_seed(0)
        config = transformers.GPT2Config(
            vocab_size=256, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)

    return make
