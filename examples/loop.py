"""The loop of the README on real text: a byte-level GPT, 160 documents, two targets, a few seconds.

Run it with ``python examples/loop.py``; only the core of assay is needed.
"""

import polars as pl
import torch

import assay
from assay.demo import CORPUS, GPT, GPTConfig

torch.manual_seed(0)
documents = pl.read_parquet(CORPUS).head(200)
documents = documents.with_columns(pl.col("text").str.slice(0, 128))
held_out, documents = documents.head(40), documents.tail(160)


def to_batch(texts):
    """Bytes of each text, padded by spaces: ``[B, 64]``."""
    return torch.tensor([list(text.encode()[:64].ljust(64)) for text in texts])


def loss_fn(model, batch):
    """Mean cross-entropy over all positions, in nats per byte."""
    return model(batch[:, :-1], batch[:, 1:])


model = GPT(GPTConfig(vocabulary=256, context=64, layers=2, heads=2, width=32))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
targets = {
    domain: assay.Target([to_batch(held_out.filter(domain=domain)["text"])], loss_fn)
    for domain in ("bible", "python_code")
}

run = assay.Run(model, optimizer, methods=[assay.InRunShapley(targets)], metadata=documents)
for epoch in range(4):
    for part in documents.sample(fraction=1, shuffle=True, seed=epoch).iter_slices(16):
        with run.step(part["id"]):
            loss = loss_fn(model, to_batch(part["text"]))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
run.close()

for target in targets:
    print(run.ledger.by("domain", target))
    print(f"{target}: {run.ledger.explained(target):.0%} of the loss drop is explained")
