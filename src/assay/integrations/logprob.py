"""TRL's fused language-model head in plain torch, where per-sample gradients can be followed.

TRL (from 1.x) projects hidden states to log-probabilities inside one custom autograd function, which nothing can see
into. Inside a step of a run it is replaced by the same formula in torch's own operations: the same numbers up to
rounding, but the logits of the micro-batch exist at once, `[tokens, vocabulary]`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["in_plain_torch"]

_FUNCTION = "_ChunkedLogProbFunction"


class _PlainLogProb:
    """Stands in for TRL's function; its arguments and results are TRL's."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: Sequence[str],
    ) -> tuple[Tensor | None, ...]:
        """`[tokens, d]` hidden states and `[tokens]` targets to `[tokens]` log-probabilities and statistics."""
        logits = F.linear(hidden, weight, bias).float() * logit_scale  # [tokens, V]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(-1, targets[:, None])[:, 0]
        p = log_p.exp()
        statistics: dict[str, Tensor] = {}
        if "entropy" in outputs:
            statistics["entropy"] = -(p * log_p).sum(-1)
        if "log_sum_sq_probs" in outputs:
            statistics["log_sum_sq_probs"] = (2 * log_p.detach()).logsumexp(-1)
        if "mean_logits" in outputs:
            statistics["mean_logits"] = logits.detach().mean(-1)
        if "is_top1" in outputs:
            statistics["is_top1"] = logits.detach().argmax(-1) == targets
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return (chosen, *(statistics.get(name) for name in names))


@contextlib.contextmanager
def in_plain_torch() -> Iterator[None]:
    """Inside, TRL's fused head is plain torch; without TRL, or with one that has no such head, nothing happens."""
    module: Any = sys.modules.get("trl.trainer.utils")
    original = getattr(module, _FUNCTION, None)
    if original is None:
        yield
        return
    setattr(module, _FUNCTION, _PlainLogProb)
    try:
        yield
    finally:
        setattr(module, _FUNCTION, original)
