"""LSTM, GRU and RNN, layer by layer and step by step: every product with a weight is then a linear layer.

The fused kernels give only the gradient of a whole sequence batch. Written as cells (Hochreiter and Schmidhuber 1997;
Cho et al., arXiv 1406.1078, in torch's arrangement of the gates), the capture sees what each sample did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.capture.call import Call, rule
from assay.errors import CoverageError

State = tuple[Tensor, ...]  # (h,) or (h, c)
Cell = Callable[[Tensor, State, "_Weights"], State]


@dataclass(frozen=True)
class _Weights:
    """One layer in one direction: `w_ih [g·h, d]`, `w_hh [g·h, h]`, biases or None, LSTM projection or None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None = None


def _lstm(gates: Tensor, state: State, weights: _Weights) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weights.w_hh, weights.b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if weights.w_hr is None else F.linear(h, weights.w_hr), c)


def _gru(gates: Tensor, state: State, weights: _Weights) -> State:
    (h,) = state
    r, z, n = gates.chunk(3, 1)
    hr, hz, hn = F.linear(h, weights.w_hh, weights.b_hh).chunk(3, 1)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return (n + torch.sigmoid(z + hz) * (h - n),)


def _rnn(nonlinearity: Callable[[Tensor], Tensor]) -> Cell:
    def cell(gates: Tensor, state: State, weights: _Weights) -> State:
        return (nonlinearity(gates + F.linear(state[0], weights.w_hh, weights.b_hh)),)

    return cell


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _rnn(torch.tanh),
    "rnn_relu": _rnn(torch.relu),
}


@rule(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
def recurrent_cell(call: Call) -> Any:
    """`lstm_cell(x [B, d], (h, c), w_ih, w_hh, b_ih, b_hh)` and its kin with one state."""
    x, state, *weights = call.args
    state = tuple(state) if call.name == "lstm_cell" else (state,)
    cell = _CELLS[call.name.removesuffix("_cell")]
    with call.capture:
        owned = _Weights(*weights)
        state = cell(F.linear(x, owned.w_ih, owned.b_ih), state, owned)
    return state if call.name == "lstm_cell" else state[0]


@rule(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def recurrent(call: Call) -> Any:
    """`lstm(x, (h, c), weights, has_biases, num_layers, dropout, train, bidirectional, batch_first)`.

    For packed sequences, `lstm(data, batch_sizes, (h, c), weights, …, bidirectional)`.
    """
    packed = isinstance(call.args[1], Tensor) and isinstance(call.args[3], (tuple, list))
    if packed:
        x, sizes, start, flat, biases, layers, dropout, training, both = call.args
        batch_first = False
    else:
        x, start, flat, biases, layers, dropout, training, both, batch_first = call.args
    if dropout and training and layers > 1 and x.device.type != "cpu":
        names = ", ".join(call.capture.names_of(mark) for t in flat if (mark := call.weight(t)) is not None)
        raise CoverageError(
            f"{names}: the fused {call.name} of this device draws its dropout inside the kernel, so that its steps "
            "cannot be written out with the same masks; use one layer per module with nn.Dropout between them."
        )
    start = tuple(start) if isinstance(start, (tuple, list)) else (start,)
    with call.capture:
        weights = _per_layer(flat, biases, call.name == "lstm" and start[0].shape[-1] != start[1].shape[-1])
        x = x.transpose(0, 1) if batch_first else x
        steps = list(x.split(sizes.tolist())) if packed else list(x.unbind(0))
        ends: list[State] = []
        for layer in range(layers):
            found = []
            for direction in range(2 if both else 1):
                k = layer * (2 if both else 1) + direction
                begin = tuple(s[k] for s in start)
                if packed and direction == 1:  # each sequence's state joins those that run already
                    begin = tuple(call.capture.rows_as(s, steps[0]) for s in begin)
                outputs, end = _direction(_CELLS[call.name], steps, begin, weights[k], reverse=direction == 1)
                found.append(outputs)
                ends.append(end)
            steps = found[0] if len(found) == 1 else [torch.cat(pair, 1) for pair in zip(*found, strict=True)]
            if dropout and training and layer < layers - 1:
                sizes_of = [len(step) for step in steps]
                steps = list(F.dropout(torch.cat(steps), dropout, True).split(sizes_of))  # type: ignore[no-untyped-call]
        out = torch.cat(steps) if packed else torch.stack(steps, 1 if batch_first else 0)
        final = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    return (out, *final)


def _per_layer(flat: Sequence[Tensor], biases: bool, projected: bool) -> list[_Weights]:
    size = 2 + 2 * biases + projected
    groups = [flat[k : k + size] for k in range(0, len(flat), size)]
    return [
        _Weights(g[0], g[1], g[2] if biases else None, g[3] if biases else None, g[-1] if projected else None)
        for g in groups
    ]


def _direction(
    cell: Cell, steps: list[Tensor], begin: State, weights: _Weights, reverse: bool
) -> tuple[list[Tensor], State]:
    """One layer in one direction over steps `[B_t, d]`, whose batch shrinks where sequences have ended (packed)."""
    counts = [len(step) for step in steps]
    projected = F.linear(torch.cat(steps), weights.w_ih, weights.b_ih).split(counts)  # type: ignore[no-untyped-call]
    outputs: list[Tensor] = [begin[0]] * len(steps)
    order = range(len(steps) - 1, -1, -1) if reverse else range(len(steps))
    state, ended = tuple(s[: counts[order[0]]] for s in begin), []
    for t in order:
        now = counts[t]
        if now < len(state[0]):
            ended.append(tuple(s[now:] for s in state))
            state = tuple(s[:now] for s in state)
        elif now > len(state[0]):
            state = tuple(torch.cat([s, b[len(s) : now]]) for s, b in zip(state, begin, strict=True))
        state = cell(projected[t], state, weights)
        outputs[t] = state[0]
    if ended:
        parts = [state, *reversed(ended)]
        state = tuple(torch.cat([part[k] for part in parts]) for k in range(len(state)))
    return outputs, state
