"""Training runs that are the same in one process with the whole batch and in two with half of it each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from methods.slow import Net, loss_fn, margin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, NAdam, Optimizer, RMSprop

import assay

Batch = tuple[Tensor, Tensor]
B = 4  # samples of a micro-batch, over all processes


class Conv(nn.Module):
    """A convolution, whose gradients are known along directions only, and a position that is added to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.position = nn.Parameter(torch.randn(1, 4, 4))
        self.conv = nn.Conv1d(4, 5, 3, padding=1)
        self.rnn = nn.LSTM(5, 3)
        self.outer = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position  # [B, T, 4]
        x = torch.tanh(self.conv(x.mT))  # [B, 5, T]
        x, _ = self.rnn(x.permute(2, 0, 1))  # [T, B, 3]: the samples are not in front
        return self.outer(x.mean(0))


class Layered(nn.Module):
    """Blocks whose inputs have the samples in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0) for _ in range(2)])
        self.outer = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(0, 1)  # [T, B, 4]
        for block in self.blocks:
            x = block(x)
        return self.outer(x.mean(0))


class Language(nn.Module):
    """GPT-2 of transformers: its output is a dataclass, its weights are stored transposed and tied."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            bos_token_id=0,
            eos_token_id=0,
            vocab_size=8,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
        self.gpt = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens).logits.mean(1)[:, :3].clone()  # fully_shard warns of views


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.2)


def heavy(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=0.1)


def adamw(model: nn.Module) -> Optimizer:
    params = list(model.parameters())
    return AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], lr=0.03, betas=(0.8, 0.95))


def adamw_float32(model: nn.Module) -> Optimizer:
    """With ε = 1e-8 the first step takes the sign of gradients that are nothing but rounding (a key's bias)."""
    return AdamW(model.parameters(), lr=0.03, eps=1e-4)


def nadam(model: nn.Module) -> Optimizer:
    return NAdam(model.parameters(), lr=0.02)


def rmsprop(model: nn.Module) -> Optimizer:
    return RMSprop(model.parameters(), lr=0.01, momentum=0.5)


@dataclass(frozen=True)
class Case:
    """One training run.

    Args:
        wrap: "ddp" or "fsdp".
        options: of `InRunShapley`.
        optimizer: how to make it.
        model: how to make the model.
        dtype: of its weights; float64 runs must agree to 1e-9, float32 runs to 1e-5.
        micro: micro-batches of a step; only the last one reduces.
        reduce_all: every micro-batch reduces.
        clip: norm at which the gradient is clipped.
        wrapper: further arguments of the wrapper.
        targets: how many batches each target has.
        autocast: the loop enters autocast inside of a step, which leaves float64 as it is; the targets' first pass
            is taken again for it.
    """

    wrap: str
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[nn.Module], Optimizer] = adamw
    model: Callable[[], nn.Module] = Net
    dtype: torch.dtype = torch.float64
    micro: int = 1
    reduce_all: bool = False
    clip: float | None = None
    wrapper: dict[str, Any] = field(default_factory=dict)
    targets: Sequence[int] = (3, 1)
    steps: int = 4
    autocast: bool = False


TRAPEZOID = {"path": "trapezoid"}
CASES: dict[str, Case] = {}
for kind in ("ddp", "fsdp"):
    CASES |= {
        f"{kind}-sgd-left": Case(kind, optimizer=sgd),
        f"{kind}-adamw-left-clip": Case(kind, clip=0.05),
        f"{kind}-trapezoid-accumulation": Case(kind, TRAPEZOID, micro=2),
        f"{kind}-trapezoid-accumulation-reduced": Case(kind, TRAPEZOID, micro=2, reduce_all=True, clip=0.1),
        f"{kind}-simpson-tolerance": Case(kind, {"path": "simpson", "tolerance": 1e-4}, optimizer=heavy),
        f"{kind}-momentum-exact": Case(
            kind, {**TRAPEZOID, "momentum": "exact", "horizon": 3}, optimizer=heavy
        ),
        f"{kind}-adam-exact": Case(kind, {"path": "left", "momentum": "exact", "horizon": 2}),
        f"{kind}-conv": Case(kind, TRAPEZOID, model=Conv, micro=2),
        f"{kind}-conv-momentum": Case(kind, {**TRAPEZOID, "momentum": "exact", "horizon": 2}, model=Conv),
        f"{kind}-layered": Case(kind, TRAPEZOID, model=Layered, optimizer=nadam),
        f"{kind}-gpt2-float32": Case(
            kind,
            {"path": "simpson"},
            adamw_float32,
            model=Language,
            dtype=torch.float32,
            micro=2,
            clip=1.0,
        ),
        f"{kind}-rmsprop": Case(kind, optimizer=rmsprop, targets=(1,)),
        f"{kind}-autocast": Case(kind, optimizer=heavy, autocast=True),
        f"{kind}-gradient-in-host-memory": Case(kind, {**TRAPEZOID, "target_gradient": "cpu"}, micro=2),
    }
CASES |= {
    "ddp-left-gradient-in-host-memory": Case("ddp", {"target_gradient": "cpu"}, optimizer=heavy, clip=0.05),
    "fsdp-gradient-in-bfloat16": Case("fsdp", {"target_gradient": "bfloat16"}, targets=(1,)),
    "ddp-hessian": Case("ddp", {"path": "hessian"}, optimizer=heavy),
    "ddp-sketch": Case("ddp", {**TRAPEZOID, "momentum": "sketch", "sketch": 61, "horizon": 3}),
    "ddp-bucket-view": Case("ddp", TRAPEZOID, wrapper={"gradient_as_bucket_view": True}, micro=2),
    "ddp-static-graph": Case("ddp", wrapper={"static_graph": True}),
    "ddp-find-unused": Case("ddp", wrapper={"find_unused_parameters": True}),
    "ddp-one-sample-each": Case("ddp", model=Conv, micro=2),
}


def data(size: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(6, (size, 4), generator=g), torch.randint(3, (size,), generator=g)


def made(case: Case, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.model().to(case.dtype)


def targets_of(case: Case) -> dict[str, assay.Target]:
    losses = (loss_fn, margin)
    return {
        f"target {n}": assay.Target([data(3, 1000 + 10 * n + k) for k in range(count)], losses[n])
        for n, count in enumerate(case.targets)
    }


def wrapped(case: Case, model: nn.Module) -> nn.Module:
    if case.wrap == "ddp":
        return DistributedDataParallel(model, **case.wrapper)
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if module is getattr(model, "norm", None) or type(module).__name__ in (
            "TransformerEncoderLayer",
            "GPT2Block",
        ):
            fully_shard(module)
    return fully_shard(model, **case.wrapper)


def train(
    case: Case, out: Path | None, rank: int, size: int, model: nn.Module | None = None
) -> tuple[assay.Run, dict[str, Tensor]]:
    """Train process `rank` of `size`; the run, and the weights at the end."""
    model = model or made(case)
    if size > 1:
        model = wrapped(case, model)
    optimizer = case.optimizer(model)
    run = assay.Run(model, optimizer, out=out, methods=[assay.InRunShapley(targets_of(case), **case.options)])
    samples = 2 if "one-sample" in str(out) else B
    for step in range(case.steps):
        for micro in range(case.micro):
            tokens, labels = data(samples, 100 * step + micro)
            mine = slice(rank * samples // size, (rank + 1) * samples // size)
            ids = [f"{step}/{micro}/{i}" for i in range(samples)][mine]
            last = case.reduce_all or micro == case.micro - 1
            with _synchronised(model, last), run.step(ids):
                with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                    loss = loss_fn(model, (tokens[mine], labels[mine])) / case.micro
                loss.backward()
        if case.clip is not None:
            clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    return run, {name: _whole(p) for name, p in run.model.named_parameters()}


def _synchronised(model: nn.Module, last: bool) -> Any:
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def _whole(p: Tensor) -> Tensor:
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p.clone()


__all__ = ["CASES", "Case", "F", "data", "made", "targets_of", "train", "wrapped"]
