"""TRL's SFTTrainer with assay: three lines more, on real text, in seconds.

Run it with ``python examples/sft.py``; it needs ``pip install 'assay[trainer]' trl``.
"""

import polars as pl
import tokenizers
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from assay.demo import CORPUS
from assay.integrations.transformers import AssayCallback  # 1

transformers.set_seed(0)
corpus = pl.read_parquet(CORPUS).sample(120, seed=0).with_columns(pl.col("text").str.slice(0, 200))
bpe = tokenizers.ByteLevelBPETokenizer()
bpe.train_from_iterator(corpus["text"], 400, special_tokens=["<|end|>"], show_progress=False)
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
)


def to_dataset(documents):
    """The columns url, domain and text; TRL makes tokens of the text."""
    return Dataset.from_dict({"url": documents["id"], **documents.select("domain", "text").to_dict()})


config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_embd=32, n_layer=2, n_head=2)
trainer = SFTTrainer(
    transformers.GPT2LMHeadModel(config),
    SFTConfig(
        "runs/sft",
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_length=96,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=to_dataset(corpus.tail(100)),
    eval_dataset={"code": to_dataset(corpus.head(20).filter(domain="python_code"))},
    processing_class=tokenizer,
)
callback = AssayCallback(id="url", columns=["domain", "text"], group="domain")  # 2
callback.attach(trainer)  # 3
trainer.train()

print(callback.ledger.by("domain", "code"))
print(f"code: {callback.ledger.explained('code'):.0%} of the loss drop is explained")
