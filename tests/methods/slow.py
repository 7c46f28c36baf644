"""A small training run beside which everything is written down, and the values of its steps by the definition."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

import assay
from assay.optimizers import model_of

Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]
Build = Callable[[nn.Module], Optimizer]


class Net(nn.Module):
    """Linear layers, one with its weight normalised (a weight that is computed from another), an embedding, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 5)
        self.v = nn.Parameter(torch.randn(5, 5))
        self.norm = nn.LayerNorm(5)
        self.outer = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embed(tokens)))  # [B, T, 5]
        x = torch.tanh(F.linear(x, self.v / self.v.norm(dim=1, keepdim=True)))
        logits: Tensor = self.outer(self.norm(x)).mean(1)  # [B, 3]
        return logits


def loss_fn(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def margin(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Any differentiable scalar: minus the log-odds of the labels."""
    logits = model(batch[0]).log_softmax(-1).gather(1, batch[1][:, None])  # [B, 1]
    return -(logits - torch.log1p(-logits.exp())).mean()


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().double()


def batch(size: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(6, (size, 4), generator=g), torch.randint(3, (size,), generator=g)


def grouped(model: nn.Module, kind: type[Optimizer], **options: Any) -> Optimizer:
    """Two parameter groups with learning rates of their own."""
    params = list(model.parameters())
    lr = options.pop("lr")
    return kind([{"params": params[:3]}, {"params": params[3:], "lr": 1.5 * lr}], lr=lr, **options)


OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda m: grouped(m, SGD, lr=0.3),
    "momentum": lambda m: grouped(m, SGD, lr=0.1, momentum=0.8, dampening=0.2),
    "nesterov_l2": lambda m: grouped(m, SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    "damped": lambda m: grouped(m, SGD, lr=0.1, momentum=0.8, dampening=1.0),
    "maximize": lambda m: grouped(m, SGD, lr=0.05, momentum=0.7, maximize=True),
    "adam_l2": lambda m: grouped(m, Adam, lr=0.03, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw": lambda m: grouped(m, AdamW, lr=0.03, betas=(0.8, 0.95), weight_decay=0.2),
    "amsgrad": lambda m: grouped(m, AdamW, lr=0.03, betas=(0.8, 0.9), amsgrad=True),
    "nadam": lambda m: grouped(m, NAdam, lr=0.03, betas=(0.8, 0.95)),
    "radam": lambda m: grouped(m, RAdam, lr=0.03, betas=(0.8, 0.95)),
    "adagrad": lambda m: grouped(m, Adagrad, lr=0.1),
    "rmsprop": lambda m: grouped(m, RMSprop, lr=0.02, alpha=0.9, momentum=0.8),
    "adafactor": lambda m: grouped(m, Adafactor, lr=0.05, weight_decay=0.1),
}


@dataclass
class Moment:
    """One optimizer step: the weights at both ends, K by parameter, and every sample's own gradient."""

    before: Weights
    gain: Weights  # lr · gain
    carried: Weights
    decayed: Weights
    samples: list[tuple[Hashable, Weights]]  # c · g_i, as the optimizer received it
    through: Weights = field(default_factory=dict)  # lr-free preconditioner P_t
    lr: dict[str, float] = field(default_factory=dict)
    after: Weights = field(default_factory=dict)


def train(
    build: Build,
    targets: dict[str, assay.Target],
    *,
    steps: int = 4,
    sizes: Sequence[int] = (3,),
    clip: float | None = None,
    unattended: Sequence[int] = (),
    skipped: Sequence[int] = (),
    **options: Any,
) -> tuple[assay.Run, list[Moment], nn.Module]:
    """Train with assay; `options` go to `InRunShapley`. Steps in `unattended` happen outside `run.step`."""
    model = net()
    optimizer = build(model)
    moments: list[Moment] = []
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley(targets, **options)], strict=True)
    drawn = 0
    for step in range(steps):
        samples: list[tuple[Hashable, Weights]] = []
        for micro, size in enumerate(sizes):
            data = batch(size, 100 * (step % 4) + micro)  # four batches, again and again
            ids = list(range(drawn, drawn + size))
            drawn += size
            samples += [
                (i, _gradient(model, loss_fn, (data[0][[n]], data[1][[n]]), 1 / (size * len(sizes))))
                for n, i in enumerate(ids)
            ]
            if step in unattended:
                (loss_fn(model, data) / len(sizes)).backward()
            else:
                with run.step(ids):
                    (loss_fn(model, data) / len(sizes)).backward()
        if step in skipped:
            optimizer.zero_grad()
            continue
        c = 1.0
        if clip is not None:
            c = min(1.0, clip / (float(clip_grad_norm_(model.parameters(), clip)) + 1e-6))
            assert c < 1
        moment = _moment(model, optimizer, [(i, {k: c * g for k, g in gs.items()}) for i, gs in samples])
        optimizer.step()
        optimizer.zero_grad()
        moment.after = weights(model)
        moments.append(moment)
    run.close()
    return run, moments, model


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _moment(model: nn.Module, optimizer: Optimizer, samples: list[tuple[Hashable, Weights]]) -> Moment:
    linear = model_of(optimizer)  # tested against the optimizers' true steps in tests/optimizers
    moment = Moment(weights(model), {}, {}, {}, samples)
    for name, p in model.named_parameters():
        split, lr = linear.split(p), float(linear.lr(linear.group_index(p)))
        as_full = lambda x, p=p: torch.as_tensor(x, dtype=p.dtype).expand(p.shape).detach().clone()  # noqa: E731
        moment.gain[name], moment.lr[name] = lr * as_full(split.gain), lr
        moment.carried[name], moment.decayed[name] = as_full(split.carried), as_full(split.decayed)
    return moment


def _gradient(model: nn.Module, loss: Any, data: Any, share: float) -> Weights:
    names, params = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(share * loss(model, data), params)
    return dict(zip(names, found, strict=True))


def gradient_at(at: Weights, target: assay.Target) -> Weights:
    """∇ℓ of a target at any weights."""
    leaves = {k: w.clone().requires_grad_() for k, w in at.items()}
    value = loss_at(leaves, target)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def loss_at(at: Weights, target: assay.Target) -> Tensor:
    model = net()
    losses = [target.loss(lambda x: functional_call(model, at, (x,)), data) for data in target.batches]
    return torch.stack(losses).mean()


def between(moment: Moment, s: float) -> Weights:
    return {k: w + s * (moment.after[k] - w) for k, w in moment.before.items()}


def mean_gradient(moment: Moment, target: assay.Target, rule: Sequence[tuple[float, float]]) -> Weights:
    """Σ weight · ∇ℓ(w(s)) over the (weight, s) of a quadrature rule."""
    total = {k: torch.zeros_like(w) for k, w in moment.before.items()}
    for weight, s in rule:
        for k, g in gradient_at(between(moment, s), target).items():
            total[k] += weight * g
    return total


def dot(a: Weights, b: Weights) -> float:
    return float(sum((a[k] * b[k]).sum() for k in a))


def times(a: Weights, b: Weights) -> Weights:
    return {k: a[k] * b[k] for k in a}


def row(run: assay.Run, step: int, target: str) -> dict[str, Any]:
    account = run.ledger.account(target)
    (found,) = account.filter(account["step"] == step).iter_rows(named=True)
    return found


def values_of(run: assay.Run, step: int, target: str) -> list[tuple[Hashable, float]]:
    frame = run.ledger.steps(target)
    return list(frame.filter(frame["step"] == step).select("id", "value").iter_rows())
