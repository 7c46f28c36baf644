"""Pairs of factors against the matrices that they are the product of; what is held against what was handed over."""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from assay.capture import pairs
from assay.capture.factors import Dense, Lookup, Outer
from assay.capture.held import Held, Joined, Low, Scaled, Sum, joined, number_of, scaled, total
from assay.capture.host import Conveyor, OnHost
from assay.capture.layout import Layout
from assay.capture.marks import leaf
from assay.capture.pairs import Pair
from assay.capture.products import products, through_pairs
from assay.capture.rounding import rounded

SIZES = st.integers(1, 5)


class Given(Held):
    """One target in pairs."""

    targets = 1

    def __init__(self, own: dict[Parameter, list[Pair]]) -> None:
        self.own = own

    def __getitem__(self, param: Parameter) -> Tensor:
        return pairs.written_out(self.own[param], param.shape)[None]

    def pairs(self, param: Parameter) -> list[list[Pair]]:
        return [self.own[param]]

    def __iter__(self) -> Any:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def bytes(self) -> int:
        return 0


def some_pairs(rows: int, columns: int, seed: int) -> list[Pair]:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(seed % 4, rows, generator=g, dtype=torch.float64)
    looked_up = torch.randint(rows, (3,), generator=g)
    right = [torch.randn(n, columns, generator=g, dtype=torch.float64) for n in (len(dense), 3)]
    return [Pair(dense, right[0], 0.5), Pair(looked_up, right[1], -2.0)]


@given(batch=SIZES, positions=SIZES, p=SIZES, d=SIZES, seed=st.integers(0, 99), kind=st.integers(0, 3))
def test_products_of_positions_are_products_of_matrices(
    batch: int, positions: int, p: int, d: int, seed: int, kind: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = batch * positions
    b = torch.randn(rows, p, generator=g, dtype=torch.float64)
    layout = Layout(0, batch, positions)
    if kind == 3:  # in no regular order
        layout = Layout(0, batch, 1, torch.randint(batch, (rows,), generator=g))
    a = torch.randn(rows, d, generator=g, dtype=torch.float64)
    if kind == 2:
        use: Any = Lookup(torch.randint(d, (rows,), generator=g), b, layout)
        shape = (d, p)
    else:
        use = Outer(a, b, layout, transposed=kind == 1)
        shape = (d, p) if kind == 1 else (p, d)
    w = Parameter(torch.zeros(shape, dtype=torch.float64))
    held = Given({w: some_pairs(*shape, seed)})
    mark = leaf(w, 2)
    dense = {2: use.dot(held[w])}
    with unittest.mock.patch.object(pairs, "are_cheaper", return_value=True):
        found = products(mark, use, Joined([held, Given({w: some_pairs(*shape, seed + 1)})]))
    assert list(found) == [2]
    torch.testing.assert_close(found[2][:1], dense[2], rtol=1e-12, atol=1e-12)
    assert found[2].shape == (2, batch)


def test_blocks_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "ENTRIES", 7)
    left, right = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    own = some_pairs(4, 3, 3)
    found = pairs.products(left, right, Layout(0, 2, 3), [own])
    g = torch.einsum("btp,btd->bpd", left.view(2, 3, 4), right.view(2, 3, 3))
    torch.testing.assert_close(found[0], (g * pairs.written_out(own, (4, 3))).sum((1, 2)))


def test_the_cheaper_order_is_taken() -> None:
    """One position of validation meets long sequences in pairs; many positions meet a sample's one as a matrix."""
    few = [[Pair(torch.zeros(1, 768), torch.zeros(1, 768))]]
    many = [[Pair(torch.zeros(4096, 768), torch.zeros(4096, 768))]]
    assert pairs.are_cheaper(64, 1, (768, 768), few, "cpu", rides=False)
    assert not pairs.are_cheaper(16, 1024, (768, 768), many, "cpu", rides=True)
    w = Parameter(torch.zeros(768, 768))
    use = Outer(torch.zeros(64, 768), torch.zeros(64, 768), Layout(0, 64))
    assert through_pairs(leaf(w, 0), use, Given({w: few[0]})) is not None
    assert through_pairs(leaf(w, 0), rounded(use), Given({w: few[0]})) is not None
    assert through_pairs(leaf(w, 0), Dense(torch.zeros(64, 768, 768)), Given({w: few[0]})) is None
    assert through_pairs(leaf(w, 0), use, {w: torch.zeros(1, 768, 768)}) is None


def test_what_is_made_of_held_directions() -> None:
    w, v = (Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in range(2))
    a, b = ({p: torch.randn(1, 3, 2, dtype=torch.float64) for p in (w, v)} for _ in range(2))
    conveyor = Conveyor()
    for x, y in ((OnHost(dict(a), conveyor), b), (b, OnHost(dict(a), conveyor))):
        first, second = (a, b) if y is b else (b, a)
        found = total([(0.5, total([(1.0, x), (1.0, y)])), (2.0, y)])
        assert isinstance(found, Sum)
        assert len(found.parts) == 3
        for p in (w, v):
            torch.testing.assert_close(found[p], 0.5 * (first[p] + second[p]) + 2 * second[p])
    held = OnHost(dict(a), conveyor)
    K = torch.randn(3, 2, dtype=torch.float64)
    weighted = scaled(held, {w: K, v: 2.0}.get)
    assert isinstance(weighted, Scaled)
    torch.testing.assert_close(weighted[w], K * a[w])
    torch.testing.assert_close(weighted[v], 2 * a[v])
    assert not scaled(held, {w: K}.get)[v].any()
    both = joined([held, weighted])
    assert number_of(both) == 2
    torch.testing.assert_close(both[w], torch.cat([a[w], K * a[w]]))
    assert list(both) == [w, v]


def test_low_is_what_compiled_graphs_are_given() -> None:
    w = Parameter(torch.zeros(2))
    low = Low({w: torch.tensor([[1.0, 1 / 3]])})
    assert low.stored(w).dtype == torch.bfloat16
    assert Scaled(low, lambda _: 1.0).stored(w).dtype == torch.bfloat16
    assert Scaled(low, lambda _: 2.0).stored(w).dtype == torch.float32
    whole = {w: torch.ones(1, 2)}
    Low(whole)
    assert not whole  # taken over: no second copy stays with the caller


class Noted(Conveyor):
    """Writes down what is moved; the device is torch's own without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, float]] = []

    def away(self, x: Tensor) -> Tensor:
        return torch.full(x.shape, float(len(self.log)))

    def start(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        self.log.append(("start", host[0, 0].item()))
        return host.to(device), host[0, 0].item()

    def arrived(self, x: Tensor, event: Any) -> Tensor:
        self.log.append(("read", event))
        return x


def test_the_next_parameter_travels_while_one_is_read() -> None:
    params = [Parameter(torch.zeros(2, device="meta")) for _ in range(3)]
    conveyor = Noted()

    def step(order: list[int]) -> list[tuple[str, float]]:
        held = OnHost({p: torch.empty(1, 2, device="meta") for p in params}, conveyor)
        for k, p in enumerate(held._host):
            held._host[p] = torch.full((1, 2), float(k))
        conveyor.log.clear()
        for k in order:
            assert held[params[k]].device.type == "meta"
        return list(conveyor.log)

    start, read = (lambda k: ("start", float(k))), (lambda k: ("read", float(k)))
    assert step([0, 1, 2]) == [start(0), read(0), start(1), read(1), start(2), read(2)]
    # from the second step on in the order of the first
    assert step([0, 1, 2]) == [start(0), start(1), read(0), start(2), read(1), read(2)]
    # in another order: what travelled in vain is let go of
    assert step([0, 2, 1]) == [start(0), start(1), read(0), start(2), read(2), start(1), start(2), read(1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_what_comes_back_is_what_went() -> None:
    params = [Parameter(torch.randn(512, 256, device="cuda")) for _ in range(8)]
    conveyor = Conveyor()
    for _ in range(3):
        whole = {p: torch.randn(1, 512, 256, device="cuda") for p in params}
        copies = {p: g.clone() for p, g in whole.items()}
        held = OnHost(whole, conveyor)
        assert held.bytes() == 0
        assert all(x.is_pinned() for x in held._host.values())
        for p in params:
            assert torch.equal(held[p], copies[p])
