"""Values against one backward pass per sample, dense gradients and the optimizers' formulas by hand."""

# mypy: allow-untyped-calls
from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from reference import CASES, Case, Snapshot, Target, plan, snapshot, train, values, widened
from reference.cases import ODD, OWN, TABLE, Batch
from reference.compare import (
    check,
    one_target,
    recorded,
    relative_error,
    snapshots_of_plain_training,
    valuation,
    valued,
)
from reference.dense import Step
from reference.forms import FORMS, forced
from reference.settings import CLIP, MAIN, OPTIMIZERS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

import assay

# --- the table of the main job


ROWS = [(case.name, reduction) for case in TABLE for reduction in case.losses]


@cache
def dense(name: str, reduction: str, optimizer: str, parts: int, clip: float | None) -> dict[str, list[Step]]:
    """The reference, which cases share, by size of the validation batch."""
    case = CASES[name]
    loss = case.losses[reduction]
    data = plan(case, sizes=(4,) * parts)
    snapshots = snapshots_of_plain_training(case, loss, OPTIMIZERS[optimizer], data, clip)
    targets = {str(size): one_target(case, loss, size)["held_out"] for size in (1, 5)}
    return values(snapshots, loss, targets, clip=clip, tolerance=case.tolerance)


@pytest.mark.parametrize("size", [1, 5], ids=lambda size: f"val{size}")
@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize("parts", [1, 3], ids=lambda parts: f"accumulate{parts}")
@pytest.mark.parametrize(
    ("name", "reduction"),
    ROWS,
    ids=lambda value: value,
)
def test_table(name: str, reduction: str, parts: int, clip: float | None, optimizer: str, size: int) -> None:
    case = CASES[name]
    loss = case.losses[reduction]
    data, targets = plan(case, sizes=(4,) * parts), one_target(case, loss, size)
    ledger = valued(case, loss, OPTIMIZERS[optimizer], data, targets, clip)
    expected = dense(name, reduction, optimizer, parts, clip)[str(size)]
    assert relative_error(recorded(ledger), expected) <= case.tolerance


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_clipping_is_active(case: Case) -> None:
    """Or half of the table would say nothing about clipping."""
    for loss in case.losses.values():
        free = snapshots_of_plain_training(case, loss, OPTIMIZERS["sgd"], plan(case))
        clipped = snapshots_of_plain_training(case, loss, OPTIMIZERS["sgd"], plan(case), CLIP)
        assert not torch.equal(*(next(s[-1].model.parameters()) for s in (free, clipped)))


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
@pytest.mark.parametrize(("name", "reduction"), ROWS, ids=lambda value: value)
def test_float32(name: str, reduction: str, optimizer: str) -> None:
    """The training of the run itself is in float32; the reference looks at each of its steps in float64."""
    case, build = CASES[name], OPTIMIZERS[optimizer]
    loss = case.losses[reduction]
    data, snapshots = plan(case, sizes=(4, 4), dtype=torch.float32), list[Snapshot]()
    narrow = case.batch(5, seed=7, dtype=torch.float32)
    model = case.model(torch.float32)
    opt = build(model)
    run = assay.Run(model, opt, methods=[valuation({"held_out": Target([narrow], loss)})])
    train(
        model,
        opt,
        data,
        loss,
        clip=CLIP,
        record=run.step,
        before_step=lambda number: snapshots.append(snapshot(case, model, opt, build, data[number])),
    )
    run.close()
    targets = {"held_out": Target([widened(narrow)], loss)}
    expected = values(snapshots, loss, targets, clip=CLIP, tolerance=1e-5)["held_out"]
    assert relative_error(recorded(run.ledger), expected) <= 1e-4


# --- one trap each


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
@pytest.mark.parametrize("case", ODD, ids=lambda case: case.name)
def test_odd_models(case: Case, optimizer: str) -> None:
    loss = list(case.losses.values())[-1]
    targets = one_target(case, loss, 5)
    check(case, loss, OPTIMIZERS[optimizer], plan(case), targets, CLIP)


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw_large_eps"])
@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_loss_of_the_models_own(case: Case, optimizer: str) -> None:
    """`model(labels=...).loss`; a large ε, since 1/√v would magnify the rounding of its float32 logits."""
    loss = case.losses["token_mean"]
    check(case, loss, OPTIMIZERS[optimizer], plan(case, sizes=(4, 3)), one_target(case, loss, 5), CLIP)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str) -> None:
    case = CASES["mlp"]
    loss = case.losses["sample_mean"]
    data = plan(case, steps=5, sizes=(4, 4))
    check(case, loss, OPTIMIZERS[optimizer], data, one_target(case, loss, 5), CLIP)


def test_several_targets_of_several_batches() -> None:
    """A target's loss is the mean over its batches, whatever their sizes; each target has its own loss."""
    case = CASES["gpt2"]
    targets = {
        "one": Target([case.batch(1, seed=7)], case.losses["token_mean"]),
        "five": Target([case.batch(5, seed=8)], case.losses["sum"]),
        "uneven": Target([case.batch(n, seed=20 + n) for n in (1, 3, 2)], case.losses["sample_mean"]),
    }
    for optimizer in ("sgd_momentum", "adamw"):
        check(case, case.losses["token_mean"], OPTIMIZERS[optimizer], plan(case), targets, CLIP)


@pytest.mark.parametrize(
    "name", ["mlp", "mlp_tokens", "cnn", "gpt", "called_twice", "two_modules_one_weight"]
)
def test_many_targets(name: str) -> None:
    case = CASES[name]
    loss = case.losses["sum"]
    targets = {f"target {n}": Target([case.batch(n + 1, seed=30 + n)], loss) for n in range(4)}
    check(case, loss, OPTIMIZERS["adamw"], plan(case, sizes=(4, 4)), targets, CLIP)


def parameter_groups(model: nn.Module) -> Optimizer:
    """Decay on matrices only, a learning rate of its own for the last layer, one layer at rate zero."""
    named = dict(model.named_parameters())
    head = [named.pop(name) for name in list(named) if name.startswith("net.3")]
    still = [named.pop("net.0.bias")]
    return AdamW(
        [
            {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0, "eps": 1e-3},
            {"params": head, "lr": 0.05, "betas": (0.7, 0.9)},
            {"params": still, "lr": 0.0},
        ],
        lr=0.01,
    )


def test_parameter_groups() -> None:
    case = CASES["mlp"]
    loss = case.losses["sample_mean"]
    check(case, loss, parameter_groups, plan(case), one_target(case, loss, 5), CLIP)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3, 1, 5), (2, 7)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "mlp",
        "mlp_tokens",
        "cnn",
        "gpt",
        "raw_parameters",
        "sequence_first",
        "class_token",
        "temperature",
    ],
)
def test_sizes_of_micro_batches(name: str, sizes: tuple[int, ...]) -> None:
    """One sample alone, and micro-batches of unequal sizes within a step."""
    case = CASES[name]
    loss = list(case.losses.values())[-1]
    check(case, loss, OPTIMIZERS["adamw"], plan(case, sizes=sizes), one_target(case, loss, 1), CLIP)


@pytest.mark.parametrize("sequence", [1, 2, 3], ids=lambda T: f"T{T}")
@pytest.mark.parametrize("size", [1, 2, 3], ids=lambda B: f"B{B}")
def test_short_sequences(size: int, sequence: int) -> None:
    """Every coincidence of batch size and sequence length, down to one."""
    case = CASES["gpt"]

    def cut(B: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {name: x[:, :sequence].contiguous() for name, x in CASES["gpt"].draw(B, generator).items()}

    short = replace(case, draw=cut)
    loss = case.losses["token_mean"]
    check(short, loss, OPTIMIZERS["sgd_momentum"], plan(short, sizes=(size,)), one_target(short, loss, 2))


FROZEN = {
    "first layer": lambda name: name.startswith("net.0"),
    "normalisation": lambda name: name.startswith("net.2"),
    "weights": lambda name: name.endswith("weight"),
    "biases": lambda name: name.endswith("bias"),
    "all but one": lambda name: name != "net.3.bias",
}


@pytest.mark.parametrize("given", ["all parameters", "trainable parameters"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen: str, given: str) -> None:
    def build() -> nn.Module:
        model = CASES["mlp"].build()
        for name, param in model.named_parameters():
            param.requires_grad_(not FROZEN[frozen](name))
        return model

    def optimizer(model: nn.Module) -> Optimizer:
        every = given == "all parameters"
        return AdamW([p for p in model.parameters() if every or p.requires_grad], lr=0.01)

    case = replace(CASES["mlp"], build=build)
    loss = case.losses["sample_mean"]
    check(case, loss, optimizer, plan(case), one_target(case, loss, 5), CLIP)


def test_frozen_embedding() -> None:
    def build() -> nn.Module:
        model = CASES["gpt2"].build()
        model.get_parameter("transformer.wpe.weight").requires_grad_(False)
        return model

    case = replace(CASES["gpt2"], build=build)
    loss = case.losses["token_mean"]
    check(case, loss, OPTIMIZERS["adamw"], plan(case), one_target(case, loss, 5), CLIP)


def test_unused_parameter_moves_nothing() -> None:
    """AdamW decays what has a gradient only; the unused layer has none, and its K must not be asked for."""
    case = CASES["unused"]
    loss = case.losses["sample_mean"]
    for optimizer in MAIN:
        targets = one_target(case, loss, 1)
        check(case, loss, OPTIMIZERS[optimizer], plan(case), targets, CLIP)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("optimizer", "way"),
    [
        ("sgd_momentum", "rides"),
        ("sgd_momentum", "strict"),
        ("adamw", "keep"),
        ("adamw", "strict"),
        ("adamw", "recompute"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "mlp", "mlp_tokens", "sequence_first", "two_modules_one_weight"])
def test_every_contraction(name: str, optimizer: str, way: str, form: str) -> None:
    """Whatever the cost model chooses on this machine, each form gives the same values.

    Under SGD they come with the backward pass; under AdamW from gradients that are kept, or from a pass taken again.
    """
    case = CASES[name]
    loss = list(case.losses.values())[-1]
    targets = {f"target {n}": Target([case.batch(n + 1, seed=30 + n)], loss) for n in range(2)}
    memory = "recompute" if way == "recompute" else "keep"
    with forced(form):
        data = plan(case, sizes=(4, 3))
        check(case, loss, OPTIMIZERS[optimizer], data, targets, CLIP, memory=memory, strict=way == "strict")


def test_batch_norm() -> None:
    """A sample's part is what flows through *its* use of the weights, where batch statistics mix the samples too.

    The reference gives every sample a copy of the weights and takes the gradients of the copies.
    """
    case = CASES["mlp"]
    model = nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()
    nn.init.normal_(model.get_parameter("1.weight"))
    batch, held_out = case.batch(6, seed=1), case.batch(3, seed=7)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    model.eval()
    direction = torch.autograd.grad(loss(model, held_out), list(model.parameters()))
    model.train()
    copies = [p.detach().expand(6, *p.shape).clone().requires_grad_() for p in model.parameters()]
    W1, b1, gain, shift, W2, b2 = copies
    h = torch.einsum("bi,boi->bo", batch["x"], W1) + b1
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() * gain + shift
    logits = torch.einsum("bi,boi->bo", torch.tanh(h), W2) + b2
    parts = torch.autograd.grad(F.cross_entropy(logits, batch["labels"]), copies)
    expected = sum(
        (
            0.1 * torch.einsum("bi,i->b", g.flatten(1), d.flatten())
            for g, d in zip(parts, direction, strict=True)
        ),
        start=torch.zeros(6, dtype=torch.float64),
    )

    opt = SGD(model.parameters(), lr=0.1)
    run = assay.Run(model, opt, methods=[assay.InRunShapley({"held_out": assay.Target([held_out], loss)})])
    with run.step(range(6)):
        loss(model, batch).backward()
    opt.step()
    run.close()
    torch.testing.assert_close(
        torch.tensor([v for _, v in recorded(run.ledger)[0]], dtype=torch.float64), expected
    )
