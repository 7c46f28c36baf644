"""TRL's SFTTrainer: its own tokenization, its fused language-model head, and packed rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import assay
from assay.integrations.identity import content_id

trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")

from assay.integrations.transformers import AssayCallback  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["to be or not to be"], 300, special_tokens=["<|end|>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


@pytest.fixture
def make_trainer(tokenizer: Any, tmp_path: Path) -> Any:
    import datasets
    import transformers

    from assay.demo import CORPUS

    frame = pl.read_parquet(CORPUS).sample(40, seed=2).with_columns(pl.col("text").str.slice(0, 24))
    data = datasets.Dataset.from_list(frame.select("id", "domain", "text").to_dicts())

    def make(**arguments: Any) -> Any:
        transformers.set_seed(0)
        config = transformers.GPT2Config(
            vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "trainer"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-5,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "max_length": 48,
            "gradient_checkpointing": False,
            **arguments,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trl.SFTTrainer(
                transformers.GPT2LMHeadModel(config),
                trl.SFTConfig(**settings),
                train_dataset=data.select(range(32)),
                eval_dataset=data.select(range(32, 40)),
                processing_class=tokenizer,
            )

    return make


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("checkpointing", [False, True])
def test_documents_are_valued_by_their_names(make_trainer: Any, checkpointing: bool) -> None:
    trained = []
    for watched in (False, True):
        trainer = make_trainer(gradient_checkpointing=checkpointing)
        callback = AssayCallback(id="id", columns=["domain"], path="trapezoid", momentum="exact")
        if watched:
            callback.attach(trainer)
        trainer.train()
        trained.append(trainer.model)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    ledger = callback.ledger
    names = {row["id"]: row["domain"] for row in trainer.train_dataset}
    assert set(ledger.values()["id"]) <= set(names)
    assert ledger.values().height == 32
    assert all(names[id_] == domain for id_, domain in ledger.metadata().select("id", "domain").iter_rows())
    assert ledger.explained() == pytest.approx(1, abs=0.02)
    assert callback.run is not None
    assert callback.run.coverage()["status"].unique().to_list() == ["exact"]  # the head too


def test_the_plain_head_gives_what_the_fused_one_gives(make_trainer: Any) -> None:
    from assay.integrations import logprob

    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for plain in (False, True):
        trainer.model.zero_grad()
        with logprob.in_plain_torch() if plain else torch.enable_grad():
            out = trainer.model(**batch, fused_lm_head=True)
        out.loss.backward()
        found.append((out, [p.grad.clone() for p in trainer.model.parameters()]))
    (fused, gradients), (own, own_gradients) = found
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(own, name), getattr(fused, name))
    for a, b in zip(own_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_packed_rows_know_their_documents(make_trainer: Any) -> None:
    """Wrapped packing cuts documents up: a row is a sample, named by its content whatever the order."""
    trainer = make_trainer(packing=True, packing_strategy="wrapped")
    callback = AssayCallback().attach(trainer)
    trainer.train()
    content = {
        content_id({k: row[k] for k in ("input_ids", "labels") if k in row}) for row in trainer.train_dataset
    }
    assert set(callback.ledger.values()["id"]) <= content


def test_flattened_rows_are_one_sample_with_its_documents(make_trainer: Any) -> None:
    """TRL's padding-free packing makes one row of all: it is the sample, and a table says what lies in it."""
    trainer = make_trainer(packing=True, packing_strategy="bfd")
    unpacked = make_trainer()
    callback = AssayCallback().attach(trainer)
    trainer.train()
    ledger = callback.ledger
    packed = ledger.table("packed")
    assert set(packed["id"]) == set(ledger.values()["id"])
    documents = {content_id(row["input_ids"]): len(row["input_ids"]) for row in unpacked.train_dataset}
    found = dict(packed.select("document", "tokens").iter_rows())
    assert len(found) > 20
    assert found.items() <= documents.items()
    assert packed.group_by("id").len()["len"].min() > 1
    assert isinstance(ledger, assay.Ledger)


def test_a_target_is_of_as_many_documents_where_the_collator_makes_one_row_of_several(
    make_trainer: Any,
) -> None:
    trainer = make_trainer(padding_free=True, max_length=None, per_device_eval_batch_size=2)
    callback = AssayCallback(rows=5).attach(trainer)
    (target,) = callback._make_targets().values()
    assert [int((batch["position_ids"] == 0).sum()) for batch in target.batches] == [2, 2, 1]
