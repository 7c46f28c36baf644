"""Lightning with assay: three lines more, on real text, in seconds.

Run it with ``python examples/lightning_module.py``; it needs ``pip install 'assay[lightning]'``.
"""

import lightning as L
import polars as pl
import torch
from torch.utils.data import DataLoader

import assay
from assay.demo import CORPUS, GPT, GPTConfig
from assay.integrations.lightning import AssayCallback  # 1

L.seed_everything(0, verbose=False)
corpus = pl.read_parquet(CORPUS).sample(200, seed=0)


def to_rows(documents):
    """One mapping per document: its name, and its bytes as tokens."""
    tokens = [torch.tensor(list(text.encode()[:64].ljust(64))) for text in documents["text"]]
    return [{"url": url, "tokens": row} for url, row in zip(documents["id"], tokens, strict=True)]


class Language(L.LightningModule):
    """A small GPT over bytes."""

    def __init__(self):
        super().__init__()
        self.model = GPT(GPTConfig(vocabulary=256, context=64, layers=2, heads=2, width=32))

    def loss(self, batch):
        """Mean cross-entropy over all positions, in nats per byte."""
        return self.model(batch["tokens"][:, :-1], batch["tokens"][:, 1:])

    def training_step(self, batch, index):
        """One micro-batch."""
        return self.loss(batch)

    def configure_optimizers(self):
        """Any optimizer that assay knows."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


held_out = next(iter(DataLoader(to_rows(corpus.head(40).filter(domain="python_code")), 40)))
target = assay.Target([held_out], lambda module, batch: module.loss(batch))  # 2
callback = AssayCallback({"code": target}, ids="url", metadata=corpus.drop("text"), group="domain")  # 3
trainer = L.Trainer(
    max_epochs=4,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    callbacks=[callback],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Language(), DataLoader(to_rows(corpus.tail(160)), 8, shuffle=True))

print(callback.ledger.by("domain", "code"))
print(f"code: {callback.ledger.explained('code'):.0%} of the loss drop is explained")
