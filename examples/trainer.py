"""Hugging Face Trainer with assay: three lines more, on real text, in seconds.

Run it with ``python examples/trainer.py``; it needs ``pip install 'assay[trainer]'``.
"""

import polars as pl
import transformers
from datasets import Dataset

from assay.demo import CORPUS
from assay.integrations.transformers import AssayCallback  # 1

transformers.set_seed(0)
corpus = pl.read_parquet(CORPUS).sample(200, seed=0)


def to_dataset(documents):
    """One row per document; its bytes are its tokens."""
    tokens = [list(text.encode()[:64].ljust(64)) for text in documents["text"]]
    return Dataset.from_dict(
        {"url": documents["id"], "domain": documents["domain"], "input_ids": tokens, "labels": tokens}
    )


rest = corpus.tail(160)
held_out = {domain: to_dataset(corpus.head(40).filter(domain=domain)) for domain in ("bible", "python_code")}
config = transformers.GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2)
trainer = transformers.Trainer(
    transformers.GPT2LMHeadModel(config),
    transformers.TrainingArguments(
        "runs/trainer",
        num_train_epochs=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    data_collator=transformers.default_data_collator,
    train_dataset=to_dataset(rest),
    eval_dataset=held_out,
)
callback = AssayCallback(id="url", columns=["domain"], group="domain")  # 2
callback.attach(trainer)  # 3
trainer.train()

for target in callback.ledger.targets:
    print(callback.ledger.by("domain", target))
    print(f"{target}: {callback.ledger.explained(target):.0%} of the loss drop is explained")
