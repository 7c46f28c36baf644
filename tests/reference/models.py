"""Small plain-torch networks, each with one habit that a capture can get wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 13
CONTEXT = 8
WIDTH = 8
FEATURES = 7
CLASSES = 5


class MLP(nn.Module):
    """Two linear layers, with normalisation; takes `[B, FEATURES]` and `[B, T, FEATURES]` alike."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class CNN(nn.Module):
    """Convolutions with stride, padding, dilation and groups; both kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=1, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Learned positions looked up by one row of indices for the whole batch, `[T]`; tied head.

    Args:
        positions: where the row comes from: `"arange"` in forward, or a registered `"buffer"`.
        tied: whether the head shares the token table.
    """

    def __init__(self, positions: str = "arange", tied: bool = True) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.token.weight
        self.row: Tensor | None
        self.register_buffer(
            "row", torch.arange(CONTEXT) if positions == "buffer" else None, persistent=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        row = torch.arange(T, device=tokens.device) if self.row is None else self.row[:T]
        x = self.token(tokens) + self.position(row)  # [B, T, WIDTH] + [T, WIDTH]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, masked by a `[CONTEXT, CONTEXT]` buffer, and a perceptron."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.mask: Tensor
        self.register_buffer(
            "mask", torch.tril(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(D, dim=2)
        q, k, v = (y.view(B, T, self.heads, D // self.heads).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(2, 3)) / (D // self.heads) ** 0.5  # [B, heads, T, T]
        attention = scores.masked_fill(~self.mask[:T, :T], float("-inf")).softmax(3)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CalledTwice(nn.Module):
    """One linear layer used twice in a forward pass: the two uses of a sample multiply with each other's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))  # type: ignore[no-any-return]


class TwoModulesOneWeight(nn.Module):
    """Two linear modules that share a weight, one of them with a bias; the second use is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, WIDTH)
        self.middle = nn.Linear(FEATURES, WIDTH, bias=False)
        self.middle.weight = self.encoder.weight
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.encoder(x)) @ self.encoder.weight  # [B, FEATURES]
        return self.head(torch.tanh(self.middle(y)))  # type: ignore[no-any-return]


class RawParameters(nn.Module):
    """Hand-written RMSNorm with `1 + w`, LayerScale, a position table `[1, T, WIDTH]`: none a module."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.position = nn.Parameter(0.3 * torch.randn(1, CONTEXT, WIDTH))
        self.scale = nn.Parameter(0.1 * torch.randn(WIDTH))
        self.gamma = nn.Parameter(0.5 + 0.1 * torch.randn(WIDTH))
        self.shift = nn.Parameter(0.1 * torch.randn(WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.leave = nn.Parameter(0.5 * torch.randn(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, FEATURES]
        x = self.enter(x) + self.position[:, : x.shape[1]]
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.scale)
        x = x + self.gamma * torch.tanh(self.inner(y)) + self.shift
        return x @ self.leave


class SequenceFirst(nn.Module):
    """Works on `[T, B, WIDTH]` inside, as recurrent code and `nn.Transformer` do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, FEATURES]
        x = self.enter(x.transpose(0, 1))
        x = x + torch.tanh(self.inner(self.norm(x)))
        return self.head(x).transpose(0, 1)  # type: ignore[no-any-return]


class WithUnused(MLP):
    """An MLP with a layer that no forward pass reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


class WithDropout(MLP):
    """An MLP that draws random numbers while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.net[1](self.net[0](x)), 0.3, self.training)
        return self.net[3](self.net[2](hidden))  # type: ignore[no-any-return]
