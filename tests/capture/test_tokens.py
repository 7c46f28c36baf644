"""Values taken apart by token, against autograd with a copy of every weight for every (sample, position)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.capture import Capture, Weights
from assay.capture.tokens import contract_by_token

B, T, D, V = 3, 5, 6, 11


class Copied(nn.Module):
    """A small language model whose every use of a weight may be given its own copy per sample and position.

    `copies[use]` is `[B, T, *shape]`; the model is written out in plain products, so that plain autograd answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, D))
        self.place = nn.Parameter(torch.randn(T, D))
        self.qkv = nn.Linear(D, 3 * D)
        self.scale = nn.Parameter(torch.randn(D))
        self.norm = nn.LayerNorm(D)
        self.pooled = nn.Linear(D, 4)
        nn.init.normal_(self.norm.weight)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = F.embedding(ids, self.table) + self.place
        q, k, v = self.qkv(self.norm(x)).split(D, dim=2)
        scores = q @ k.mT + torch.full((T, T), -torch.inf).triu(1).to(q)
        x = x + (scores.softmax(-1) @ v) * (1 + self.scale)
        return F.linear(x, self.table), self.pooled(x.mean(1))

    def written_out(self, ids: Tensor, copies: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        rows = ids[..., None, None].expand(-1, -1, 1, D)
        place = torch.diagonal(
            copies["place"], dim1=1, dim2=2
        ).mT  # copy (i, t) has all T rows; row t is used
        x = copies["table lookup"].gather(2, rows)[:, :, 0] + place
        h = F.layer_norm(x, (D,)) * copies["norm.weight"] + copies["norm.bias"]
        q, k, v = (torch.einsum("btpd,btd->btp", copies["qkv.weight"], h) + copies["qkv.bias"]).split(
            D, dim=2
        )
        scores = q @ k.mT + torch.full((T, T), -torch.inf).triu(1).to(q)
        x = x + (scores.softmax(-1) @ v) * (1 + copies["scale"])
        pooled = (
            torch.einsum("bpd,bd->bp", copies["pooled.weight"][:, 0], x.mean(1)) + copies["pooled.bias"][:, 0]
        )
        return torch.einsum("btvd,btd->btv", copies["table head"], x), pooled


def loss_of(outputs: tuple[Tensor, Tensor]) -> Tensor:
    logits, pooled = outputs
    return logits.square().cos().mean() + pooled.sin().sum()


def expected(model: Copied, ids: Tensor, directions: dict[nn.Parameter, Tensor]) -> Tensor:
    """`[B, T + 1]`: inner products by position, those of the pooled head last."""
    owners = {"table lookup": "table", "table head": "table"}
    named = dict(model.named_parameters())
    uses = ["table lookup", "table head", *(name for name in named if name != "table")]
    copies = {
        use: named[owners.get(use, use)]
        .detach()
        .expand(B, T, *named[owners.get(use, use)].shape)
        .clone()
        .requires_grad_()
        for use in uses
    }
    loss_of(model.written_out(ids, copies)).backward()
    out = torch.zeros(B, T + 1, dtype=torch.float64)
    for use, copy in copies.items():
        assert copy.grad is not None
        parts = (copy.grad * directions[named[owners.get(use, use)]][0]).flatten(2).sum(2)  # [B, T]
        if use.startswith("pooled"):
            out[:, T] += parts.sum(1)
        else:
            out[:, :T] += parts
    return out


def captured(model: nn.Module, ids: Tensor, directions: dict[nn.Parameter, Tensor]) -> tuple[Tensor, Tensor]:
    weights = Weights(model.named_parameters(), dict.fromkeys(model.parameters(), 0))
    capture = Capture(weights, len(ids), keep=list(model.parameters()), by_token=True)
    capture.enter(ids)
    with capture:
        loss_of(model(ids)).backward()
    like = torch.zeros(1, 1, len(ids), dtype=torch.float64)
    with torch.no_grad():
        found = contract_by_token(capture.kept, directions, like, capture.positions)
    return found[0, 0], capture


def test_against_a_copy_of_every_weight() -> None:
    model, ids = Copied().double(), torch.randint(0, V, (B, T))
    directions = {p: torch.randn(1, *p.shape, dtype=torch.float64) for p in model.parameters()}
    found, _ = captured(model, ids, directions)
    torch.testing.assert_close(found, expected(model, ids, directions), rtol=1e-10, atol=1e-12)
