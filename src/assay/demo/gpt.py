"""A small GPT in plain torch: learned positions, pre-LayerNorm, GELU, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "IGNORED", "GPTConfig"]

IGNORED = -100
"""The target of a position that does not count: padding, and nothing to predict after the last token."""


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a :class:`GPT`.

    Attributes:
        vocabulary: number of token ids.
        context: longest sequence, in tokens.
        layers: number of transformer blocks.
        heads: attention heads per block; must divide ``width``.
        width: size of the residual stream.
    """

    vocabulary: int
    context: int = 384
    layers: int = 4
    heads: int = 4
    width: int = 128


class Attention(nn.Module):
    """Causal self-attention; padding needs no mask as long as it stands at the end of a row."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )  # each [B, H, T, D/H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D/H]
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, D))
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised first and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))  # [B, T, D]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class GPT(nn.Module):
    """A decoder-only transformer after GPT-2 (Radford et al., 2019), section 2.3.

    Example:
        >>> model = GPT(GPTConfig(vocabulary=50, context=8, layers=1, heads=2, width=16))
        >>> tokens = torch.arange(12).view(2, 6)                     # [B, T]
        >>> model(tokens).shape                                      # [B, T, vocabulary]
        torch.Size([2, 6, 50])
        >>> model(tokens[:, :-1], tokens[:, 1:]).shape               # mean loss over the tokens
        torch.Size([])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.token.weight
        self._initialise()

    def _initialise(self) -> None:
        std = 0.55 / self.config.width**0.5  # GPT-2's 0.02 at its width of 768
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):  # 2 · layers of them add to the residual stream
                nn.init.normal_(parameter, std=std / (2 * self.config.layers) ** 0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Give the logits, or the loss where targets are given.

        Args:
            tokens: token ids, ``[B, T]`` with ``T <= context``.
            targets: the token id that follows each position, ``[B, T]``; :data:`IGNORED` where none counts.

        Returns:
            Logits ``[B, T, vocabulary]``, or the mean cross-entropy over the counted tokens, in nats, ``[]``.
        """
        B, T = tokens.shape
        # one row of positions per sample, so that a per-sample gradient of the position table exists
        positions = torch.arange(T, device=tokens.device).expand(B, T)
        x = self.token(tokens) + self.position(positions)  # [B, T, D]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))  # [B, T, V]
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
