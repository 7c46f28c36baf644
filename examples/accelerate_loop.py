"""A loop with Accelerate and assay: three lines more, on real text, in seconds.

Run it with ``python examples/accelerate_loop.py``; it needs ``pip install assay accelerate``.
"""

import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import assay
from assay.demo import CORPUS, GPT, GPTConfig

set_seed(0)
corpus = pl.read_parquet(CORPUS).sample(200, seed=0)


def to_rows(documents):
    """One mapping per document: its name, and its bytes as tokens."""
    tokens = [torch.tensor(list(text.encode()[:64].ljust(64))) for text in documents["text"]]
    return [{"url": url, "tokens": row} for url, row in zip(documents["id"], tokens, strict=True)]


def loss_fn(model, batch):
    """Mean cross-entropy over all positions, in nats per byte."""
    return model(batch["tokens"][:, :-1], batch["tokens"][:, 1:])


accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = GPT(GPTConfig(vocabulary=256, context=64, layers=2, heads=2, width=32))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(to_rows(corpus.tail(160)), 8, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

held_out = next(iter(DataLoader(to_rows(corpus.head(40).filter(domain="python_code")), 40)))
shapley = assay.InRunShapley({"code": assay.Target([held_out], loss_fn)})  # 1
run = assay.Run(model, optimizer, methods=[shapley], metadata=corpus.drop("text"))  # 2
for _epoch in range(4):
    for batch in loader:
        with accelerator.accumulate(model), run.step(batch["url"]):  # 3
            accelerator.backward(loss_fn(model, batch))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
run.close()

print(run.ledger.by("domain", "code"))
print(f"code: {run.ledger.explained('code'):.0%} of the loss drop is explained")
