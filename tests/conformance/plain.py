"""Architectures in plain torch: each entry makes a model and a batch of three samples for it, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

BATCH = 3
Made = tuple[Module, dict[str, Any]]
PLAIN: dict[str, Callable[[], Made]] = {}


def plain(maker: Callable[[], Made]) -> Callable[[], Made]:
    PLAIN[maker.__name__] = maker
    return maker


class Fed(Module):
    """Calls `body(**inputs)`; the modules that it uses are its own."""

    def __init__(self, body: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, **inputs: Any) -> Any:
        return self.body(self, **inputs)


def images(channels: int = 3, size: int = 12) -> dict[str, Any]:
    return {"x": torch.randn(BATCH, channels, size, size)}


def sequences(length: int = 5, width: int = 6) -> dict[str, Any]:
    return {"x": torch.randn(BATCH, length, width)}


def tokens(length: int = 6, vocabulary: int = 11) -> dict[str, Any]:
    return {"x": torch.randint(0, vocabulary, (BATCH, length))}


class Residual(Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(x + self.bn2(self.conv2(y)))


@plain
def resnet_eval() -> Made:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Residual(8), Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 1.5)
    return Fed(lambda m, x: m.net(x), net=model.eval()), images(size=24)


@plain
def unet() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.norm(m.down1(x)))
        b = F.relu(m.down2(a))
        up = F.interpolate(b, scale_factor=2, mode="bilinear")
        return m.out(F.relu(m.up(torch.cat([a, up], dim=1))))

    return Fed(
        body, down1=nn.Conv2d(3, 6, 3, padding=1), norm=nn.InstanceNorm2d(6, affine=True),
        down2=nn.Conv2d(6, 8, 3, stride=2, padding=1), up=nn.Conv2d(14, 6, 3, padding=1, padding_mode="reflect"),
        out=nn.Conv2d(6, 2, 1),
    ), images()  # fmt: skip


@plain
def lstm_language_model() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(m.lstm(m.table(x))[0])

    return Fed(
        body, table=nn.Embedding(11, 6), lstm=nn.LSTM(6, 7, 2, batch_first=True), head=nn.Linear(7, 11)
    ), tokens()


@plain
def lstm_bidirectional_with_projection() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        out, (h, _) = m.lstm(x.transpose(0, 1))
        return out.transpose(0, 1) + h.sum(0)[:, None].repeat(1, 1, 2)

    lstm = nn.LSTM(6, 7, 2, bidirectional=True, proj_size=4)
    return Fed(
        lambda m, x: (
            (o := m.lstm(x.transpose(0, 1)))[0].transpose(0, 1) + o[1][0].sum(0)[:, None].repeat(1, 1, 2)
        ),
        lstm=lstm,
    ), sequences()


@plain
def gru_classifier() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(m.gru(x)[1][-1])

    return Fed(
        body, gru=nn.GRU(6, 5, 2, batch_first=True, bidirectional=True), head=nn.Linear(5, 3)
    ), sequences()


@plain
def rnn_packed() -> Made:
    def body(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return m.head(out)

    return Fed(body, rnn=nn.RNN(6, 5, nonlinearity="relu", batch_first=True), head=nn.Linear(5, 3)), {
        **sequences(), "lengths": torch.tensor([3, 5, 2]),
    }  # fmt: skip


@plain
def recurrent_cells() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        h, c = x.new_zeros(len(x), 5), x.new_zeros(len(x), 5)
        g = r = h
        for t in range(x.shape[1]):
            h, c = m.lstm(x[:, t], (h, c))
            g, r = m.gru(h, g), m.rnn(h, r)
        return m.head(torch.cat([g, r], 1))

    return Fed(
        body, lstm=nn.LSTMCell(6, 5), gru=nn.GRUCell(5, 5), rnn=nn.RNNCell(5, 5), head=nn.Linear(10, 3)
    ), sequences()


@plain
def mlp_mixer() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).flatten(2).transpose(1, 2)
        x = x + m.tokens(m.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + m.channels(m.norm2(x))
        return m.head(x.mean(1))

    return Fed(
        body, stem=nn.Conv2d(3, 8, 4, 4), norm1=nn.LayerNorm(8), norm2=nn.LayerNorm(8),
        tokens=nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 9)),
        channels=nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), head=nn.Linear(8, 3),
    ), images()  # fmt: skip


@plain
def deep_sets() -> Made:
    def body(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = m.phi(x).masked_fill(~mask[..., None], float("-inf"))
        return m.rho(h.amax(1))

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    phi = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    return Fed(body, phi=phi, rho=nn.Linear(8, 2)), {**sequences(), "mask": mask}


@plain
def graph_convolution() -> Made:
    def body(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True)
        h = torch.relu(torch.bmm(adjacency / degree, m.one(x)))
        return m.two(torch.einsum("bij,bjd->bid", adjacency, h)).mean(1)

    adjacency = (torch.rand(BATCH, 5, 5) > 0.5).float() + torch.eye(5)
    return Fed(body, one=nn.Linear(6, 8), two=nn.Linear(8, 3)), {**sequences(), "adjacency": adjacency}


@plain
def transposed_convolution_autoencoder() -> Made:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.PReLU(6), nn.Conv2d(6, 8, 3, 2, 1, groups=2), nn.PReLU(),
        nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), nn.GroupNorm(2, 6), nn.SiLU(),
        nn.ConvTranspose2d(6, 3, 3, 2, 1, output_padding=1, groups=3),
    )  # fmt: skip
    return Fed(lambda m, x: m.net(x), net=net), images()


@plain
def diffusion_unet_with_time() -> Made:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(4, dtype=x.dtype) * -0.5)
        angles = t[:, None].to(x.dtype) * frequencies
        time = m.time(torch.cat([angles.sin(), angles.cos()], -1))  # [B, 16]
        scale, shift = time[:, :, None, None].chunk(2, dim=1)
        h = m.norm(m.down(x)) * (1 + scale) + shift
        tokens = h.flatten(2).transpose(1, 2)
        h = h + m.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(h.shape)
        return m.up(F.silu(h))

    return Fed(
        body, down=nn.Conv2d(3, 8, 3, 2, 1), norm=nn.GroupNorm(4, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        time=nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16)), up=nn.ConvTranspose2d(8, 3, 4, 2, 1),
    ), {**images(), "t": torch.tensor([1, 50, 7])}  # fmt: skip


@plain
def multihead_attention() -> Made:
    def body(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + m.own(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return (x + m.cross(x, y.transpose(0, 1), y.transpose(0, 1))[0]).transpose(0, 1)

    return Fed(
        body, own=nn.MultiheadAttention(6, 2, add_bias_kv=True), cross=nn.MultiheadAttention(6, 3, kdim=4, vdim=4),
    ), {**sequences(), "y": torch.randn(BATCH, 7, 4),
        "mask": torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0] * 5]).bool()}  # fmt: skip


@plain
def transformer_encoder() -> Made:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)

    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(m.encoder(m.table(x) + m.place, mask=mask, is_causal=True))

    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    return Fed(
        body,
        table=nn.Embedding(11, 8),
        place=nn.Parameter(torch.randn(6, 8)),
        encoder=encoder,
        head=nn.Linear(8, 11),
    ), tokens()


@plain
def transformer_encoder_decoder() -> Made:
    model = nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True)
    return Fed(lambda m, x, y: m.net(m.up(x), m.up(y)), net=model, up=nn.Linear(6, 8)), {
        **sequences(),
        "y": torch.randn(BATCH, 4, 6),
    }


@plain
def bilinear_scores() -> Made:
    return Fed(lambda m, x, y: m.b(x, y) + m.c(x, y), b=nn.Bilinear(6, 4, 3), c=nn.Bilinear(6, 4, 3, bias=False)), {
        "x": torch.randn(BATCH, 6), "y": torch.randn(BATCH, 4)}  # fmt: skip


@plain
def bag_of_words() -> Made:
    def body(m: Any, x: Tensor, w: Tensor) -> Tensor:
        return m.head(torch.cat([m.mean(x), m.sum(x, per_sample_weights=w), m.max(x)], -1))

    return Fed(
        body, mean=nn.EmbeddingBag(11, 5, mode="mean", padding_idx=2), sum=nn.EmbeddingBag(11, 5, mode="sum"),
        max=nn.EmbeddingBag(11, 5, mode="max"), head=nn.Linear(15, 2),
    ), {**tokens(), "w": torch.randn(BATCH, 6)}  # fmt: skip


@plain
def norms() -> Made:
    net = nn.Sequential(
        nn.Conv1d(6, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm1d(8, affine=True), nn.BatchNorm1d(8).eval(),
        nn.LayerNorm([8, 3]), nn.RMSNorm(3), nn.LocalResponseNorm(2),
    )  # fmt: skip
    return Fed(lambda m, x: m.net(x), net=net), {"x": torch.randn(BATCH, 6, 5)}


@plain
def weight_norm() -> Made:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 8, 3))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).eval()
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    return Fed(lambda m, x: m.o(m.s(m.c(x).tanh())), c=normed, s=spectral, o=orthogonal), {
        "x": torch.randn(BATCH, 6, 5)
    }


@plain
def low_rank_adapters() -> Made:
    base = nn.Linear(6, 8).requires_grad_(False)

    def body(m: Any, x: Tensor) -> Tensor:
        return m.base(x) + 0.5 * m.up(m.down(x)) + (x @ m.a @ m.b) * m.magnitude / m.base.weight.norm(dim=1)

    return Fed(
        body, base=base, down=nn.Linear(6, 2, bias=False), up=nn.Linear(2, 8, bias=False),
        a=nn.Parameter(torch.randn(6, 2)), b=nn.Parameter(torch.randn(2, 8)), magnitude=nn.Parameter(torch.rand(8)),
    ), sequences()  # fmt: skip


@plain
def mixture_of_experts() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        share, chosen = m.router(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(m.experts):
            row, slot = torch.where(chosen == e)
            out[row] += share[row, slot, None] * expert(flat[row])
        return out.view_as(x)

    experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4))
    return Fed(body, router=nn.Linear(6, 4), experts=experts), sequences()


@plain
def mixture_of_experts_sorted() -> Made:
    """Rows sorted by expert, worked on in one block each, and scattered back."""

    def body(m: Any, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        share, chosen = m.router(flat).softmax(-1).topk(2, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        rows = flat[order // 2]
        counts = torch.bincount(chosen.flatten(), minlength=4).tolist()
        blocks = [part @ m.up[e] for e, part in enumerate(rows.split(counts))]
        done = torch.cat(blocks) * share.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, order // 2, done).unflatten(0, x.shape[:2])

    return Fed(body, router=nn.Linear(6, 4), up=nn.Parameter(torch.randn(4, 6, 6))), sequences()


@plain
def siamese() -> Made:
    """One encoder called on both of a pair, and stacked along the batch."""

    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        both = m.encoder(torch.cat([x, y]))
        one, two = both.chunk(2)
        return F.cosine_similarity(one, two)[:, None] + m.encoder(x + y)

    return Fed(body, encoder=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))), {
        "x": torch.randn(BATCH, 6), "y": torch.randn(BATCH, 6)}  # fmt: skip


@plain
def tied_autoencoder() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        h = torch.sigmoid(F.linear(x, m.w, m.b))
        return F.linear(h, m.w.t()) + torch.tanh(m.w).sum(0)

    return Fed(body, w=nn.Parameter(torch.randn(8, 6)), b=nn.Parameter(torch.randn(8))), sequences()


@plain
def vision_transformer() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.patches(x).flatten(2).mT
        x = torch.cat([m.cls.expand(len(x), -1, -1), x, m.registers.repeat(len(x), 1, 1)], 1) + m.place
        x = x + m.gamma * m.block(m.norm(x))
        return m.head(x[:, 0])

    return Fed(
        body, patches=nn.Conv2d(3, 8, 4, 4), cls=nn.Parameter(torch.randn(1, 1, 8)),
        registers=nn.Parameter(torch.randn(2, 8)),
        place=nn.Parameter(torch.randn(1, 12, 8)), gamma=nn.Parameter(torch.randn(8)), norm=nn.LayerNorm(8),
        block=nn.Linear(8, 8), head=nn.Linear(8, 3),
    ), images()  # fmt: skip


@plain
def state_space_scan() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        decay = torch.exp(-F.softplus(m.log_decay))
        state = torch.zeros(len(x), 6, 4, dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            state = decay * state + x[:, t, :, None] * m.b
            outputs.append((state * m.c).sum(-1))
        return torch.stack(outputs, dim=1) + m.skip * x

    return Fed(
        body, log_decay=nn.Parameter(torch.randn(6, 4)), b=nn.Parameter(torch.randn(4)),
        c=nn.Parameter(torch.randn(6, 4)),
        skip=nn.Parameter(torch.randn(6)),
    ), sequences()  # fmt: skip


@plain
def written_in_place() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 7, 6, dtype=x.dtype)
        out[:, 0] = m.start
        out[:, 1:6] = m.inner(x)
        out[:, 6].copy_(x.mean(1))
        out += m.shift
        out[:, 2] *= m.scale
        return m.outer(out)

    return Fed(
        body, start=nn.Parameter(torch.randn(6)), inner=nn.Linear(6, 6), shift=nn.Parameter(torch.randn(7, 6)),
        scale=nn.Parameter(torch.randn(6)), outer=nn.Linear(6, 2),
    ), sequences()  # fmt: skip


@plain
def loop_over_samples() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.inner(one).relu().sum(0) for one in x]) + torch.cat(
            [m.inner(x[i : i + 1]).amax(1) for i in range(len(x))]
        )

    return Fed(body, inner=nn.Linear(6, 4)), sequences()


@plain
def relative_attention() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        place = torch.arange(5)
        bias = m.bias[(place[:, None] - place[None]) + 4].permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(x), -1, -1, -1))
        return m.out(y.transpose(1, 2).flatten(2)) + m.pad(F.pad(x, (0, 0, 1, 0)).unfold(1, 2, 1).flatten(2))

    return Fed(
        body,
        qkv=nn.Linear(6, 24),
        bias=nn.Parameter(torch.randn(9, 2)),
        out=nn.Linear(8, 6),
        pad=nn.Linear(12, 6),
    ), sequences()


@plain
def learned_queries() -> Made:
    """They attend to one another before they see a sample: attention, and a fused kernel, of weights alone."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.first(m.queries).unflatten(-1, (3, 2, 4)).permute(1, 2, 0, 3)[:, None]
        mixed = m.queries + F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        mixed = mixed + m.second(mixed, mixed, mixed, need_weights=False)[0]
        return m.cross(mixed.expand(len(x), -1, -1), x, x)[0]

    return Fed(
        body,
        queries=nn.Parameter(torch.randn(5, 8)),
        first=nn.Linear(8, 24),
        second=nn.MultiheadAttention(8, 2, batch_first=True),
        cross=nn.MultiheadAttention(8, 2, batch_first=True),
    ), sequences(width=8)
