"""Values by token in whole runs: they add up, packed texts part where they should, and what has no tokens says so."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import polars as pl
import pytest
import torch
import torch.nn.functional as F
from conformance.families import build
from torch import Tensor, nn

import assay

BATCH, LENGTH, VOCABULARY = 3, 6, 40


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def texts(seed: int, rows: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(family: str, granularity: str, optimizer: str = "AdamW", **options: Any) -> assay.Ledger:
    """Two steps of two micro-batches of unequal lengths."""
    model, _ = build(family)
    model = model.double()
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2)
    method = assay.InRunShapley(
        {"held out": assay.Target([texts(9)], next_token)}, granularity=granularity, **options
    )
    with assay.Run(model, optim, methods=[method]) as run:
        for step in range(2):
            for part in range(2):
                with run.step(range(BATCH * part, BATCH * part + BATCH)):
                    (next_token(model, texts(2 * step + part, length=LENGTH - part)) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optim.step()
            optim.zero_grad()
    return run.ledger


@pytest.mark.parametrize(("optimizer", "path"), [("SGD", "left"), ("AdamW", "left"), ("AdamW", "trapezoid")])
def test_tokens_add_up_to_the_value_of_the_sample(optimizer: str, path: str) -> None:
    found = run("gpt2", "token", optimizer, path=path)
    expected = run("gpt2", "sample", optimizer, path=path).values().sort("id")
    own = found.values().sort("id")
    assert own["value"].to_list() == pytest.approx(expected["value"].to_list(), rel=1e-9, abs=1e-14)
    tokens = found.tokens()
    sums = tokens.group_by("id").agg(pl.col("value").sum()).sort("id")
    assert sums["value"].to_list() == pytest.approx(expected["value"].to_list(), rel=1e-9, abs=1e-14)
    assert tokens.filter(pl.col("id") == 4)["token"].to_list() == [0, 1, 2, 3, 4, None]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_neox", "bloom", "qwen3", "mamba"])
def test_a_language_model_has_next_to_nothing_without_a_position(family: str) -> None:
    tokens = run(family, "token").tokens()
    rest = tokens.filter(pl.col("token").is_null())["value"].abs().sum()
    assert rest <= 1e-12 * tokens["value"].abs().sum()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_neox", "bloom", "qwen3", "mamba"])
def test_nothing_is_booked_behind_the_position_that_the_loss_looks_at(family: str) -> None:
    """In a causal model the gradient reaches positions up to there only, and that one for certain."""
    model, _ = build(family)
    model = model.double()
    optim = torch.optim.SGD(model.parameters(), lr=1e-2)
    method = assay.InRunShapley({"t": assay.Target([texts(9)], next_token)}, granularity="token")
    with assay.Run(model, optim, methods=[method]) as run:
        with run.step(range(BATCH)):
            model(texts(1)).logits[:, 2].logsumexp(-1).sum().backward()
        optim.step()
    largest = run.ledger.tokens().group_by("token").agg(pl.col("value").abs().max())
    found = dict(largest.iter_rows())
    assert found[3] == found[4] == found[5] == 0
    assert min(found[0], found[1], found[2]) > 0


class Packed(nn.Module):
    """A language model whose attention stays within the texts of a packed row, and whose positions begin anew."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.place = nn.Embedding(VOCABULARY, 8), nn.Embedding(LENGTH, 8)
        self.qkv, self.norm, self.head = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor, text: Tensor, place: Tensor) -> Tensor:
        x = self.token(ids) + self.place(place)
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = (text[:, :, None] == text[:, None]) & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        x = self.norm(x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return self.head(x)


def packed_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    ids, text, place, labels = batch
    logits = model(ids, text, place)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def test_the_tokens_of_a_packed_row_give_the_values_of_its_texts() -> None:
    """Three texts in one row, against the same texts each in a row of its own."""
    lengths, generator = (4, 2, 5), torch.Generator().manual_seed(3)
    ids = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]
    labels = [torch.cat([x[1:], torch.tensor([-100])]) for x in ids]
    text = [torch.full((n,), k) for k, n in enumerate(lengths)]
    place = [torch.arange(n) for n in lengths]
    packed = tuple(torch.cat(parts)[None] for parts in (ids, text, place, labels))
    pad = nn.utils.rnn.pad_sequence
    apart = tuple(
        pad(parts, batch_first=True, padding_value=fill)
        for parts, fill in ((ids, 0), (text, -1), (place, 0), (labels, -100))
    )

    def values(batch: tuple[Tensor, ...], names: list[str], granularity: str) -> assay.Ledger:
        model = Packed().double()
        optim = torch.optim.SGD(model.parameters(), lr=0.1)
        target = assay.Target([packed], packed_loss)
        method = assay.InRunShapley({"t": target}, granularity=granularity)
        with assay.Run(model, optim, methods=[method]) as run:
            with run.step(names):
                packed_loss(model, batch).backward()
            optim.step()
        return run.ledger

    expected = values(apart, ["a", "b", "c"], "sample").values().sort("id")["value"].to_list()
    tokens = values(packed, ["row"], "token").tokens().sort("token", nulls_last=True)["value"].to_list()
    starts = (0, 4, 6, 11)
    found = [sum(tokens[a:b]) for a, b in pairwise(starts)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert tokens[-1] == 0


def test_a_model_without_sequences_says_so() -> None:
    model = nn.Linear(4, 2)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    target = assay.Target([torch.ones(1, 4)], lambda m, x: m(x).sum())
    run = assay.Run(model, optim, methods=[assay.InRunShapley(target, granularity="token")])
    with run.step([0, 1]):
        model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(assay.InputError, match=r"granularity='token'.*\[B, T\]"):
        optim.step()


def test_momentum_that_is_shared_out_has_no_tokens() -> None:
    target = assay.Target([None], lambda m, x: m.weight.sum())
    with pytest.raises(assay.InputError, match=r"momentum='exact'.*choose momentum='instant'"):
        assay.InRunShapley(target, granularity="token", momentum="exact")
