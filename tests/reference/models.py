"""Small plain-torch networks, each with one habit that a capture can get wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
        positions: where the row comes from: `"arange"` in forward, the same `"expanded"` to the batch, or a
            registered `"buffer"`.
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
        self.expanded = positions == "expanded"
        self.row: Tensor | None
        self.register_buffer(
            "row", torch.arange(CONTEXT) if positions == "buffer" else None, persistent=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        row = torch.arange(T, device=tokens.device) if self.row is None else self.row[:T]
        row = row.expand(tokens.shape) if self.expanded else row
        x = self.token(tokens) + self.position(row)  # [B, T, WIDTH] + [T, WIDTH] or [B, T, WIDTH]
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
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


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


class InPlace(nn.Module):
    """Activations that overwrite the output of a convolution and of a linear layer, and sums that grow in place."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(inplace=True), nn.Flatten(1))
        self.inner = nn.Linear(96, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inner(self.features(x)), inplace=True)
        logits = self.head(x)
        logits += self.head(torch.tanh(x))
        return logits  # type: ignore[no-any-return]


class InPlaceOverTokens(nn.Module):
    """The same on `[B, T, FEATURES]`, where a linear layer gives a view."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, WIDTH)
        self.gate = nn.Parameter(torch.rand(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inner(x), inplace=True) * 1.0
        x += self.gate
        return self.head(x)  # type: ignore[no-any-return]


class Temperature(nn.Module):
    """Parameters without a dimension: CLIP's temperature, a shared shift."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, CLASSES)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.shift = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) + self.shift) * self.scale.exp()


class ClassToken(nn.Module):
    """A learned token that is expanded to the batch and joined to the sequence, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.block = Block()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, FEATURES]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.enter(x)], dim=1)
        return self.head(self.block(x))[:, 1:] + self.head(self.token)  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    """A block whose forward pass is run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.enter(x), use_reentrant=False)
        return self.head(x)  # type: ignore[no-any-return]


class Routed(nn.Module):
    """Tokens that a mask sends to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(FEATURES, WIDTH), nn.Linear(FEATURES, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, FEATURES]
        left = x[..., 0] > 0
        y = x.new_zeros(*x.shape[:2], WIDTH)
        y[left] = torch.tanh(self.one(x[left]))
        y[~left] = torch.tanh(self.two(x[~left]))
        return self.head(y)  # type: ignore[no-any-return]


class Cube(torch.autograd.Function):
    """`w³ x` with a backward pass of its own, as a fused kernel has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        return grad * weight**3, (grad * x * 3 * weight**2).sum(0)


class WithCube(nn.Module):
    """An MLP behind a fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 7))
        self.inner = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(Cube.apply(x, self.gain))  # type: ignore[no-any-return, no-untyped-call]
