"""Text to token ids: a byte-pair vocabulary learned from the corpus, or a pretrained model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.errors import InputError
from assay.train.optional import require

__all__ = ["Tokenizer", "learn_tokenizer", "pretrained_tokenizer", "saved_tokenizer"]

END = "<|end|>"


@dataclass(frozen=True)
class Tokenizer:
    """What the training loop needs of a tokenizer.

    Attributes:
        split: token ids of each text, without marks for start and end.
        pieces: the part of the text that each of these tokens stands for; together they are the text.
        start: the token before a document.
        end: the token after a document.
        size: number of token ids.
        save: writes the tokenizer into a folder.
    """

    split: Callable[[list[str]], list[list[int]]]
    pieces: Callable[[list[str]], list[list[str]]]
    start: int
    end: int
    size: int
    save: Callable[[Path], object]

    def encode(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text, with the marks for start and end around them."""
        return [[self.start, *tokens, self.end] for tokens in self.split(list(texts))]


def learn_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Learn a byte-level byte-pair encoding (Sennrich et al., 2016; bytes as in GPT-2).

    Args:
        texts: what to learn from.
        size: most token ids; a small corpus may give fewer.

    Returns:
        A tokenizer that depends on nothing but the texts and the size.

    Example:
        >>> tokenizer = learn_tokenizer(["to be or not to be"] * 3, size=300)
        >>> len(tokenizer.encode(["to be"])[0])                      # start, "to", " be", end
        4
    """
    tokenizers: Any = require("tokenizers", "train")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _of_bpe(bpe)


def saved_tokenizer(folder: Path) -> Tokenizer:
    """Read a tokenizer that was learned for a run, from where the run saved it.

    Raises:
        InputError: it is not there, or damaged.
    """
    tokenizers: Any = require("tokenizers", "train")
    path = folder / "tokenizer.json"
    try:
        return _of_bpe(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare exceptions
        raise InputError(
            f"{path} cannot be read as a tokenizer ({str(error).splitlines()[0]}): put a copy of it back"
        ) from error


def _pieces(text: str, offsets: Iterable[tuple[int, int]]) -> list[str]:
    """Cut a text where its tokens end; a character that takes several tokens goes to the first of them.

    Example:
        >>> _pieces("to be", [(0, 2), (2, 5)])
        ['to', ' be']
    """
    pieces, at = [], 0
    for _, end in offsets:
        pieces.append(text[at:end] if end > at else "")
        at = max(at, end)
    return pieces


def _of_bpe(bpe: Any) -> Tokenizer:
    return Tokenizer(
        split=lambda texts: [encoding.ids for encoding in bpe.encode_batch(texts, add_special_tokens=False)],
        pieces=lambda texts: [
            _pieces(text, encoding.offsets)
            for text, encoding in zip(texts, bpe.encode_batch(texts, add_special_tokens=False), strict=True)
        ],
        start=bpe.token_to_id(END),
        end=bpe.token_to_id(END),
        size=bpe.get_vocab_size(),
        save=lambda folder: bpe.save(str(folder / "tokenizer.json")),
    )


def pretrained_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer of a pretrained model.

    Args:
        name: a folder, or a name on the Hugging Face hub.

    Raises:
        InputError: it cannot be loaded, or it has no token that marks the end of a document.
    """
    transformers: Any = require("transformers", "transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # each tokenizer class raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the tokenizer of {name!r} cannot be loaded ({reason}): check the name") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name!r} has no end-of-text token: choose a tokenizer with one")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Tokenizer(
        # lengths above the model's are no mistake here: rows are cut afterwards
        split=lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"],
        pieces=lambda texts: [
            _pieces(
                text,
                tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)[
                    "offset_mapping"
                ],
            )
            for text in texts
        ],
        start=start,
        end=tokenizer.eos_token_id,
        size=len(tokenizer),
        save=tokenizer.save_pretrained,
    )
