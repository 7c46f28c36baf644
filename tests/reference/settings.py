"""Optimizers and clipping of the comparisons."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

BuildOptimizer = Callable[[nn.Module], Optimizer]

OPTIMIZERS: dict[str, BuildOptimizer] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1),
    "sgd_momentum": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd_nesterov": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    "sgd_maximize": lambda m: SGD(m.parameters(), lr=0.01, momentum=0.9, maximize=True),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    "adamw_large_eps": lambda m: AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.99), eps=1e-2),
    "adamw_amsgrad": lambda m: AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "adam_decayed": lambda m: Adam(m.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    "adam_loop": lambda m: Adam(m.parameters(), lr=0.01, foreach=False),
}
CLIP = 0.05
"""Largest norm: below every gradient norm that occurs, as `test_clipping_is_active` checks."""

MAIN = ("sgd_momentum", "sgd_nesterov", "adamw")
"""The optimizers that every model is trained with."""
