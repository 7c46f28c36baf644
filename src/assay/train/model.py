"""The model that a configuration names, its tokenizer, and its loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.demo import GPT, IGNORED, GPTConfig
from assay.errors import InputError
from assay.train.batches import Batch
from assay.train.config import Model
from assay.train.optional import require
from assay.train.tokenizer import Tokenizer, learn_tokenizer, pretrained_tokenizer, saved_tokenizer

__all__ = ["build_model", "load_model", "pick_device", "save_model", "token_mean_loss"]


def build_model(config: Model, texts: Iterable[str]) -> tuple[nn.Module, Tokenizer]:
    """Make the model and its tokenizer.

    Args:
        config: the section ``model`` of the configuration.
        texts: the training text, from which the built-in model's tokenizer is learned.

    Raises:
        InputError: a pretrained model cannot be loaded or cannot take rows of this length.
    """
    if config.name != "gpt":
        return _load_pretrained(config.name, config.context), pretrained_tokenizer(config.name)
    tokenizer = learn_tokenizer(texts, config.vocabulary)
    sizes = GPTConfig(tokenizer.size, config.context, config.layers, config.heads, config.width)
    return GPT(sizes), tokenizer


def token_mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the counted tokens of a batch, in nats, ``[]``."""
    if isinstance(model, GPT):
        return cast(Tensor, model(batch.tokens, batch.targets))
    # rows are padded at their end, where a causal model cannot look back from, so no mask is needed
    logits = model(input_ids=batch.tokens, use_cache=False).logits  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def save_model(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights and tokenizer: ``save_pretrained`` for a transformers model, else ``weights.pt``."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, GPT):
        torch.save(model.state_dict(), folder / "weights.pt")
    else:
        cast(Any, model).save_pretrained(folder)
    tokenizer.save(folder)


def load_model(config: Model, folder: Path) -> tuple[nn.Module, Tokenizer]:
    """Read weights and tokenizer from where :func:`save_model` wrote them.

    Args:
        config: the section ``model`` of the run's configuration.
        folder: of the weights.

    Raises:
        InputError: they are not there, or do not fit the configuration.
    """
    if config.name != "gpt":
        return _load_pretrained(str(folder), config.context), pretrained_tokenizer(str(folder))
    tokenizer = saved_tokenizer(folder)
    sizes = GPTConfig(tokenizer.size, config.context, config.layers, config.heads, config.width)
    model = GPT(sizes)
    try:
        model.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu", weights_only=True))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{folder / 'weights.pt'} cannot be loaded ({reason}): put a copy of it back, or train anew"
        ) from error
    return model, tokenizer


def pick_device(name: str) -> torch.device:
    """The device of that name, if this machine has it.

    Raises:
        InputError: torch does not know the name, or the machine has no such device.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch built without CUDA
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the device {name!r} cannot be used ({reason}): choose another, such as cpu"
        ) from error
    return device


def _load_pretrained(name: str, context: int) -> nn.Module:
    transformers = require("transformers", "transformers")
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise InputError(f"model.name: there is no folder {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to users of the model's own features
            model = transformers.AutoModelForCausalLM.from_pretrained(name)
    except Exception as error:  # the library raises whatever its network and file layers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "give a folder that save_pretrained wrote, or a hub name while online"
        raise InputError(f"the model {name!r} cannot be loaded ({reason}); {advice}") from error
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise InputError(f"model.context {context} is more than {name!r} can take: {longest}")
    return cast(nn.Module, model.float())
