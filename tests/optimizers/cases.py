"""Optimizers × options, and one small problem on which they all step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

SHAPES = [(4, 3), (5,), (), (2, 3, 4)]


@dataclass(frozen=True)
class Case:
    """One optimizer class with options; ``second`` are those of the second parameter group."""

    kind: type[Optimizer]
    options: dict[str, Any]
    second: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[list[Parameter], Optimizer]:
        params = [Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
        groups = [{"params": params[:2]}, {"params": params[2:], **self.second}]
        return params, self.kind(groups, **self.options, **more)


SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "damped": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "maximize": {"momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
}
ADAM_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"betas": (0.9, 0.95), "weight_decay": 0.0},
    "decay": {"betas": (0.8, 0.99), "weight_decay": 0.2, "eps": 1e-3},
    "maximize": {"weight_decay": 0.2, "maximize": True},
}
AMSGRAD = {"amsgrad": {"amsgrad": True, "betas": (0.9, 0.5), "weight_decay": 0.1}}
DECOUPLED = {"decoupled": {"weight_decay": 0.2, "decoupled_weight_decay": True, "maximize": True}}
OPTIONS: dict[type[Optimizer], dict[str, dict[str, Any]]] = {
    SGD: SGD_OPTIONS,
    Adam: ADAM_OPTIONS | AMSGRAD,
    AdamW: ADAM_OPTIONS | AMSGRAD,
    NAdam: ADAM_OPTIONS | DECOUPLED | {"ramp": {"momentum_decay": 0.5}},
    RAdam: ADAM_OPTIONS | DECOUPLED | {"never_rectified": {"betas": (0.9, 0.6)}},
    Adagrad: {
        "plain": {},
        "decay": {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3},
        "maximize": {"weight_decay": 0.1, "maximize": True},
    },
    RMSprop: {
        "plain": {},
        "momentum": {"momentum": 0.9, "alpha": 0.8, "weight_decay": 0.1},
        "centered": {"centered": True, "alpha": 0.6, "weight_decay": 0.1, "eps": 1e-4},
        "maximize": {"centered": True, "alpha": 0.9, "momentum": 0.5, "weight_decay": 0.1, "maximize": True},
    },
    Adafactor: {
        "plain": {},
        "decay": {"beta2_decay": -0.5, "weight_decay": 0.2, "eps": (1e-6, 1e-2)},
        "unclipped": {"d": 100.0},
        "maximize": {"weight_decay": 0.2, "maximize": True},
    },
}
SECOND: dict[type[Optimizer], dict[str, Any]] = {
    SGD: {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.0},
    Adagrad: {"lr": 0.3, "weight_decay": 0.0},
    RMSprop: {"lr": 0.005, "weight_decay": 0.0},
    Adafactor: {"lr": 0.9, "d": 2.0},
}
FUSED = (SGD, Adam, AdamW, Adagrad)

TABLE = {
    f"{kind.__name__}-{name}": Case(
        kind,
        {"lr": 0.05, **options},
        SECOND.get(kind, {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.0}),
    )
    for kind, table in OPTIONS.items()
    for name, options in table.items()
}


def gradients(params: list[Parameter], steps: int, missing: bool = True) -> Iterator[int]:
    """Give the parameters new random gradients, ``steps`` times; the second gets none at step 1."""
    for step in range(steps):
        for i, param in enumerate(params):
            scale = 10.0 ** torch.randint(-2, 3, ()).item()
            param.grad = None if missing and (i, step) == (1, 1) else scale * torch.randn_like(param)
        yield step


def values(params: list[Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]
