"""The built-in GPT is causal, ties its embeddings, and padding does not reach its loss."""

from __future__ import annotations

import pytest
import torch

from assay.demo import GPT, IGNORED, GPTConfig
from assay.train.batches import Row, make_batch

CONFIG = GPTConfig(vocabulary=40, context=12, layers=2, heads=2, width=16)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).double()


def test_a_token_does_not_see_what_follows(model: GPT) -> None:
    tokens = torch.randint(40, (3, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 40
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_the_loss_is_the_mean_over_the_counted_tokens(model: GPT) -> None:
    rows = [Row(0, list(range(10))), Row(1, [5, 6, 7])]
    batch = make_batch(rows)
    alone = [make_batch([row]) for row in rows]
    losses = [model(one.tokens, one.targets).item() for one in alone]
    expected = (9 * losses[0] + 2 * losses[1]) / 11
    assert model(batch.tokens, batch.targets).item() == pytest.approx(expected, rel=1e-12)
    nothing = torch.full_like(batch.targets[1], IGNORED)
    counted = torch.stack([batch.targets[0], nothing])
    assert model(batch.tokens, counted).item() == pytest.approx(losses[0], rel=1e-12)


def test_embeddings_are_tied(model: GPT) -> None:
    assert model.head.weight is model.token.weight
    names = [name for name, _ in model.named_parameters()]
    assert "head.weight" not in names


def test_the_demo_model_has_one_to_three_million_parameters() -> None:
    model = GPT(GPTConfig(vocabulary=4096))
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6


def test_it_learns_a_repeating_sequence() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    tokens = torch.arange(13).repeat(4, 1) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3
    assert losses[-1] < 0.1
