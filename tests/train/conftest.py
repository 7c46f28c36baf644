"""Small inputs that several tests of the training command share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.corpus import write_documents


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of the corpus as JSON lines, about 100 characters each."""
    return write_documents(tmp_path_factory.mktemp("data") / "texts.jsonl", 60, 100)


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
