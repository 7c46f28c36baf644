"""The models, batches and losses of the comparison table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference import models
from reference.models import CLASSES, CONTEXT, FEATURES, VOCABULARY

IGNORED = -100

Batch = dict[str, Tensor]
"""Tensors with one sample per row of dimension 0."""

Predict = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
"""From model and batch to logits `[B, (T,) C]` and targets `[B, (T)]`, IGNORED where nothing counts."""


@dataclass(frozen=True)
class Loss:
    """A cross-entropy in one of three reductions, written as a user writes it, and its split into samples.

    Args:
        reduction: `"sum"`, `"sample_mean"` (mean over the samples of each one's mean over tokens) or
            `"token_mean"` (mean over all tokens of the micro-batch that count).
        predict: logits and targets.
        whole: the model's own loss for the full batch, where it has one (Hugging Face `labels=`).
    """

    reduction: str
    predict: Predict
    whole: Callable[[nn.Module, Batch], Tensor] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a micro-batch, `[]`."""
        if self.whole is not None:
            return self.whole(model, batch)
        logits, targets = self.predict(model, batch)
        if targets.dim() == 1:
            return F.cross_entropy(logits, targets, reduction="sum" if self.reduction == "sum" else "mean")
        if self.reduction == "sum":
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        if self.reduction == "token_mean":
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # [B, T], 0 where ignored
        return (losses.sum(1) / targets.ne(IGNORED).sum(1)).mean()

    def part(self, model: nn.Module, batch: Batch, i: int) -> Tensor:
        """Sample i's term in the loss of the micro-batch, `[]`, from the model run on that sample alone."""
        logits, targets = self.predict(model, {name: rows[i : i + 1] for name, rows in batch.items()})
        total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
        return total / self._divisor(batch, i)

    def _divisor(self, batch: Batch, i: int) -> int:
        samples = len(next(iter(batch.values())))
        if self.reduction == "sum":
            return 1
        counted = batch["labels"].ne(IGNORED)
        if counted.dim() == 1:
            return samples
        if "input_ids" in batch:
            counted = counted[:, 1:]  # Hugging Face shifts the labels inside: the first one predicts nothing
        return int(counted.sum()) if self.reduction == "token_mean" else samples * int(counted[i].sum())


@dataclass(frozen=True)
class Case:
    """A model, what it is fed, and the losses that make sense for it.

    Args:
        build: draws the model's weights from torch's global generator.
        draw: `draw(B, generator)` is a batch of B samples.
        losses: by name of the reduction.
        tolerance: largest relative error in float64 (1e-6 where the model itself casts to float32).
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], Batch]
    losses: Mapping[str, Loss] = field(repr=False)
    tolerance: float = 1e-9

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Module:
        """The model with the weights of that seed; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().to(dtype)

    def batch(self, size: int, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
        """A batch of `size` samples; floating-point entries in `dtype`."""
        batch = self.draw(size, torch.Generator().manual_seed(seed))
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


def _lengths(B: int, T: int, g: torch.Generator) -> Tensor:
    """`[B, T]`: True on the tokens of each sample, which has 2 to T of them."""
    return torch.arange(T) < torch.randint(2, T + 1, (B, 1), generator=g)


def _classified(shape: tuple[int, ...]) -> Callable[[int, torch.Generator], Batch]:
    """Inputs of that shape with one class each."""

    def draw(B: int, g: torch.Generator) -> Batch:
        x = torch.randn(B, *shape, generator=g, dtype=torch.float64)
        return {"x": x, "labels": torch.randint(CLASSES, (B,), generator=g)}

    return draw


def _tagged(T: int) -> Callable[[int, torch.Generator], Batch]:
    """Sequences `[T, FEATURES]` of unequal lengths with one class per position."""

    def draw(B: int, g: torch.Generator) -> Batch:
        x = torch.randn(B, T, FEATURES, generator=g, dtype=torch.float64)
        labels = torch.randint(CLASSES, (B, T), generator=g)
        return {"x": x, "labels": labels.masked_fill(~_lengths(B, T, g), IGNORED)}

    return draw


def _tokens(T: int) -> Callable[[int, torch.Generator], Batch]:
    """Tokens of unequal lengths and the tokens that follow them."""

    def draw(B: int, g: torch.Generator) -> Batch:
        tokens = torch.randint(VOCABULARY, (B, T + 1), generator=g)
        kept = _lengths(B, T, g)
        return {
            "tokens": tokens[:, :-1].masked_fill(~kept, 0),
            "labels": tokens[:, 1:].masked_fill(~kept, IGNORED),
        }

    return draw


def _padded(T: int) -> Callable[[int, torch.Generator], Batch]:
    """What a Hugging Face collator gives: padded tokens, attention mask, labels."""

    def draw(B: int, g: torch.Generator) -> Batch:
        tokens = torch.randint(VOCABULARY, (B, T), generator=g)
        kept = _lengths(B, T, g)
        return {
            "input_ids": tokens.masked_fill(~kept, 0),
            "attention_mask": kept.long(),
            "labels": tokens.masked_fill(~kept, IGNORED),
        }

    return draw


def _classify(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch["x"]), batch["labels"]


def _follow(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch["tokens"]), batch["labels"]


def _predict_next(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1], batch["labels"][:, 1:]


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _losses(predict: Predict, *reductions: str) -> dict[str, Loss]:
    return {reduction: Loss(reduction, predict) for reduction in reductions}


REDUCTIONS = ("sum", "sample_mean", "token_mean")
PER_SAMPLE = _losses(_classify, "sum", "sample_mean")
PER_TOKEN = _losses(_classify, *REDUCTIONS)
NEXT_TOKEN = _losses(_follow, *REDUCTIONS)
HUGGING_FACE = _losses(_predict_next, *REDUCTIONS)
OWN_LOSS = {"token_mean": Loss("token_mean", _predict_next, whole=_own_loss)}


def gpt2(dropout: float = 0.0) -> nn.Module:
    """A GPT-2 of two blocks: `Conv1D`, tied embeddings, positions of shape `[1, T]`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=8, n_layer=2, n_head=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama(tied: bool) -> nn.Module:
    """A Llama of two blocks: RMSNorm that computes in float32, rotary positions, grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


TABLE = (
    Case("gpt2", gpt2, _padded(6), HUGGING_FACE),
    Case("llama_tied", lambda: llama(tied=True), _padded(6), HUGGING_FACE, tolerance=1e-6),
    Case("llama_untied", lambda: llama(tied=False), _padded(6), HUGGING_FACE, tolerance=1e-6),
    Case("mlp", models.MLP, _classified((FEATURES,)), PER_SAMPLE),
    Case("mlp_tokens", models.MLP, _tagged(5), PER_TOKEN),
    Case("cnn", models.CNN, _classified((2, 6, 6)), PER_SAMPLE),
    Case("gpt", models.GPT, _tokens(6), NEXT_TOKEN),
    Case("gpt_square", models.GPT, _tokens(4), NEXT_TOKEN),  # T equal to the batch size of the table
)
"""What issue and README promise: every one of them with every loss, optimizer, clipping and accumulation."""

ODD = (
    Case("gpt2_square", gpt2, _padded(4), HUGGING_FACE),
    Case("gpt_buffer_square", lambda: models.GPT("buffer"), _tokens(4), NEXT_TOKEN),
    Case("gpt_expanded", lambda: models.GPT("expanded"), _tokens(5), NEXT_TOKEN),
    Case("gpt_untied", lambda: models.GPT(tied=False), _tokens(5), NEXT_TOKEN),
    Case("mlp_as_wide_as_the_batch", lambda: models.MLP(4), _classified((4,)), PER_SAMPLE),
    Case("called_twice", models.CalledTwice, _classified((FEATURES,)), PER_SAMPLE),
    Case("called_twice_tokens", models.CalledTwice, _tagged(4), PER_TOKEN),
    Case("two_modules_one_weight", models.TwoModulesOneWeight, _classified((FEATURES,)), PER_SAMPLE),
    Case("raw_parameters", models.RawParameters, _tagged(5), PER_TOKEN),
    Case("raw_parameters_square", models.RawParameters, _tagged(4), PER_TOKEN),
    Case("sequence_first", models.SequenceFirst, _tagged(5), PER_TOKEN),
    Case("sequence_first_square", models.SequenceFirst, _tagged(4), PER_TOKEN),
    Case("unused", models.WithUnused, _classified((FEATURES,)), PER_SAMPLE),
    Case("in_place", models.InPlace, _classified((2, 6, 6)), PER_SAMPLE),
    Case("in_place_over_tokens", models.InPlaceOverTokens, _tagged(5), PER_TOKEN),
    Case("temperature", models.Temperature, _tagged(5), PER_TOKEN),
    Case("class_token", models.ClassToken, _tagged(5), PER_TOKEN),
    Case("checkpointed", models.Checkpointed, _tagged(5), PER_TOKEN),
    Case("custom_function", models.WithCube, _classified((FEATURES,)), PER_SAMPLE),
    Case("routed", models.Routed, _tagged(5), PER_TOKEN),
)
"""One trap each."""

OWN = (
    Case("gpt2_own_loss", gpt2, _padded(6), OWN_LOSS, tolerance=1e-6),
    Case("llama_own_loss", lambda: llama(tied=True), _padded(6), OWN_LOSS, tolerance=1e-6),
)
"""Models that compute their loss themselves, in float32."""

CASES = {case.name: case for case in (*TABLE, *ODD, *OWN)}
