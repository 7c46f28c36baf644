"""Language models and texts for `assay index` and `assay search`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from assay.train.tokenizer import Tokenizer

__all__ = ["batches_of", "load", "summed_loss"]

IdBatch = tuple[list[Any], dict[str, Any]]


def load(name: str, tokens: int, device: str) -> tuple[nn.Module, Tokenizer, int]:
    """A model, its tokenizer, and how many tokens of a text it takes.

    Args:
        name: the folder of a run of `assay train`, a transformers model's folder, or its name on the hub.
        tokens: at most so many tokens of a text.
        device: where the model goes.

    Raises:
        InputError: there is no such model, or no such device.
    """
    from assay.store import open_ledger
    from assay.train import Config, Model
    from assay.train.model import load_model, pick_device

    folder = Path(name)
    if (folder / "model").is_dir():
        ledger = open_ledger(folder)
        if ledger.path is None or "config" not in ledger.info:
            raise InputError(f"{name} is a run that assay train did not make: name the folder of its model")
        config = Config(**ledger.info["config"]).model
        tokens, folder = min(tokens, config.context), ledger.path / "model"
    else:
        config = Model(name=name, context=tokens)
    model, tokenizer = load_model(config, folder)
    return model.to(pick_device(device)).eval(), tokenizer, tokens


def batches_of(
    ids: Sequence[Any], texts: Sequence[str], tokenizer: Tokenizer, tokens: int, size: int, device: str
) -> Iterator[IdBatch]:
    """Ids and padded token batches, in order; of each text the first `tokens` tokens."""
    from assay.train.batches import make_batch, make_rows

    for start in range(0, len(texts), size):
        part = slice(start, start + size)
        rows = make_rows(ids[part], tokenizer.encode(texts[part]), tokens, "cut")
        batch = make_batch(rows).to(device)  # type: ignore[arg-type]
        yield [row.id for row in rows], {"tokens": batch.tokens, "targets": batch.targets}


def summed_loss(model: nn.Module, batch: Any) -> Tensor:
    """The sum over the rows of each one's mean loss per token: what a row counts depends on no other."""
    from torch.nn import functional as F

    from assay.demo import GPT, IGNORED

    tokens, targets = batch["tokens"], batch["targets"]
    logits = model(tokens) if isinstance(model, GPT) else model(input_ids=tokens, use_cache=False).logits
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    counted = targets.ne(IGNORED).sum(1)
    if not bool(counted.all()):
        raise InputError("a text has no token after its first: leave it out.")
    total: Tensor = (losses.sum(1) / counted).sum()
    return total
