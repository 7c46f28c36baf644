"""What surrounds a training step: checkpointing, autocast, loss scaling, user hooks, a compiler, validation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import assay
from conformance.families import BATCH, build

Loss = Callable[[nn.Module, Any], Tensor]


def scores(
    model: nn.Module,
    loss: Loss,
    batches: list[Any],
    target: Any,
    *,
    around: Any = nullcontext,
    lr: float = 0.05,
) -> Tensor:
    """Values of two steps of plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    method = assay.InRunShapley({"target": assay.Target([target], loss)})
    with assay.Run(model, optimizer, methods=[method]) as run:
        for step, batch in enumerate(batches):
            with run.step(range(BATCH * step, BATCH * step + BATCH)):
                with around():
                    value = loss(model, batch)
                value.backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.tensor(run.ledger.values("target").sort("id")["value"].to_list(), dtype=torch.float64)


class Blocks(nn.Module):
    """Two blocks with dropout and batch statistics, checkpointed in one of two ways or not."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))
            for _ in range(2)
        )
        self.head, self.reentrant = nn.Linear(8, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            inner = (
                block
                if self.reentrant is None
                else lambda h, b=block: checkpoint(b, h, use_reentrant=self.reentrant)
            )
            x = x + inner(x)
        return self.head(x)


def classified(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def rows(seed: int, count: int = BATCH) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def plain_scores(model: nn.Module, **options: Any) -> Tensor:
    torch.manual_seed(7)
    return scores(model, classified, [rows(0), rows(1)], rows(2, 5), **options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    torch.testing.assert_close(plain_scores(Blocks(reentrant)), plain_scores(Blocks()), rtol=1e-4, atol=1e-8)


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_a_compiled_model_stays_compiled_in_a_step() -> None:
    import torch._dynamo.testing

    counts = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(Blocks(), backend=counts)
    found = plain_scores(compiled)
    torch.testing.assert_close(found, plain_scores(Blocks()), rtol=1e-4, atol=1e-8)
    assert (
        3 <= counts.frame_count <= 5
    )  # the target's passes with gradients and without; the first step and the others


def test_user_hooks_see_what_they_see_without() -> None:
    def hooked() -> tuple[nn.Module, list[Tensor]]:
        model, seen = Blocks(), []
        model.head.weight.register_hook(lambda g: seen.append(g.clone()))
        model.head.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
        model.stem.register_forward_hook(lambda m, i, o: o * 2)
        model.stem.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        return model, seen

    model, seen = hooked()
    torch.manual_seed(7)
    scores(model, classified, [rows(0)], rows(2, 5))
    bare, expected = hooked()
    torch.manual_seed(7)
    bare.eval()
    classified(bare, rows(2, 5)).backward(inputs=[p for p in bare.parameters() if p is not bare.stem.bias])
    bare.train(), bare.zero_grad(), expected.clear()
    classified(bare, rows(0)).backward()
    for found, truth in zip(seen[-len(expected) :], expected, strict=True):
        torch.testing.assert_close(found, truth)


def test_validation_leaves_statistics_and_random_numbers_alone() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))

    watched, bare = model(), model()
    plain_scores(watched)
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.05)
    for batch in (rows(0), rows(1)):
        classified(bare, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, found), expected in zip(watched.state_dict().items(), bare.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert all(module.training for module in watched.modules())


class PerSampleNorm(nn.Module):
    """Batch normalisation in training mode, its weight and bias given for each sample: the slow and obvious way."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * weight[:, :, None, None] + bias[:, :, None, None]


def test_batch_normalisation_in_training_mode() -> None:
    """A sample's gradient is what flows through its own use of the weight; the batch statistics mix the rest."""
    from assay.capture import Capture, Weights

    x, seeds = torch.randn(4, 3, 5, 5).double(), torch.randn(4, 3, 5, 5).double()
    norm = nn.BatchNorm2d(3).double()
    directions = {p: torch.randn(1, *p.shape).double() for p in norm.parameters()}
    weights = Weights(norm.named_parameters(), dict.fromkeys(norm.parameters(), 0), norm.buffers())
    capture = Capture(weights, 4, directions)
    with capture:
        (norm(x) * seeds).sum().backward()
    own = [p.detach().expand(4, -1).clone().requires_grad_() for p in norm.parameters()]
    (PerSampleNorm()(x, *own) * seeds).sum().backward()
    expected = sum(g.grad @ directions[p][0] for g, p in zip(own, norm.parameters(), strict=True))
    torch.testing.assert_close(capture.probe.grad[0, 0], expected, rtol=1e-9, atol=1e-12)
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bfloat16_autocast_ranks_as_float32_does(family: str) -> None:
    def values(around: Any) -> Tensor:
        model, _ = build(family)
        generator = torch.Generator().manual_seed(3)
        batches = [torch.randint(5, 40, (BATCH, 24), generator=generator) for _ in range(12)]
        return scores(model, next_token, batches, batches[0], around=around, lr=0.01)

    full, half = values(nullcontext), values(lambda: torch.autocast("cpu", torch.bfloat16))
    assert torch.corrcoef(torch.stack([full, half]))[0, 1] >= 0.999
