"""Packed sequences of differing lengths through recurrent layers, against autograd one sample at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from assay.capture import Capture, Weights

BATCH, LONGEST, WIDTH, HIDDEN = 4, 5, 3, 2


class Packed(nn.Module):
    """A recurrent layer whose outputs and last states both count."""

    def __init__(self, layer: nn.RNNBase, learned: bool, in_order: bool) -> None:
        super().__init__()
        self.layer, self.in_order = layer, in_order
        states = layer.num_layers * (2 if layer.bidirectional else 1)
        self.start = nn.Parameter(torch.randn(states, 1, HIDDEN)) if learned else None

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.in_order)
        begin = None
        if self.start is not None:
            h = self.start.expand(-1, len(x), -1).contiguous()
            begin = (h, h.tanh()) if isinstance(self.layer, nn.LSTM) else h
        out, last = self.layer(packed, begin)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        ends = last[0] + last[1] if isinstance(last, tuple) else last
        return padded.square().sum(1).sin() @ torch.ones(padded.shape[2]) + ends.cos().sum((0, 2))


def settings() -> list[tuple[str, int, bool, bool, bool]]:
    plain = list(product(("LSTM", "GRU"), (1, 2), (True, False), (True, False), (False,)))
    return [
        *plain,
        ("LSTM", 2, True, True, True),
        ("GRU", 1, True, True, True),
        ("RNN", 2, True, False, False),
    ]


@pytest.mark.parametrize("both", [True, False], ids=["both directions", "one direction"])
@pytest.mark.parametrize(("kind", "layers", "bias", "in_order", "learned"), settings(), ids=str)
def test_packed_sequences_of_differing_lengths(
    kind: str, layers: int, bias: bool, in_order: bool, learned: bool, both: bool
) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        layer = getattr(nn, kind)(WIDTH, HIDDEN, layers, bias=bias, bidirectional=both, batch_first=True)
        model = Packed(layer, learned, in_order)
        x = torch.randn(BATCH, LONGEST, WIDTH)
        lengths = torch.tensor([5, 3, 3, 1] if in_order else [3, 1, 5, 3])
        check(model, x, lengths)
    finally:
        torch.set_default_dtype(default)


def check(model: nn.Module, x: Tensor, lengths: Tensor) -> None:
    params = list(model.parameters())
    directions = {p: torch.randn_like(p)[None] for p in params}
    want = []
    for i in range(BATCH):
        loss = model(x[i : i + 1], lengths[i : i + 1]).sum()
        found = torch.autograd.grad(loss, params)
        want.append(sum(float((g * directions[p][0]).sum()) for p, g in zip(params, found, strict=True)))
    capture = Capture(Weights(model.named_parameters(), dict.fromkeys(params, 0)), BATCH, directions)
    capture.enter(x)
    with capture:
        model(x, lengths).sum().backward()
    assert capture.probe.grad is not None
    assert capture.probe.grad[0, 0].tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)
