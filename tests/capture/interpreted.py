"""The fused kernel on a CPU, by Triton's interpreter; `test_kernel.py` runs this file in a process of its own.

The interpreter must be chosen before Triton is imported, and other tests import it with torch's compiler.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance.compare import compare
from conformance.families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CASES, Target, plan
from reference.compare import check
from reference.settings import CLIP, OPTIMIZERS
from torch import Tensor, nn

import assay
from assay.capture import contraction, fused, kernel
from assay.capture.layout import Layout
from assay.errors import AssayWarning

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run tests/capture/test_kernel.py", allow_module_level=True)

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def near(found: Tensor, truth: Tensor, rounding: float) -> None:
    assert found.shape == truth.shape
    assert float((found.double() - truth).norm()) <= rounding * float(truth.norm()) + 1e-300


def against_einsum(a: Tensor, b: Tensor, G: Tensor) -> None:
    """In float64, sample by sample. Scores are sums in float32 of exact products: they never round to 16 bits."""
    each = torch.einsum("btp,btd->bpd", b.double(), a.double())
    total, scores = fused.fused(a, b, G)
    assert total.dtype == a.dtype
    near(total, each.sum(0), ROUNDING[a.dtype])
    near(scores, torch.einsum("bpd,npd->nb", each, G.double()), min(ROUNDING[a.dtype], 2e-6))


# B, T, d, p, targets: ragged ones, one of each, and several tiles both ways
SHAPES = [
    (1, 1, 1, 1, 1), (1, 1, 64, 64, 1), (2, 1, 7, 5, 3), (1, 9, 3, 2, 1), (3, 37, 45, 70, 2), (4, 5, 130, 33, 3),
    (2, 64, 64, 64, 1), (2, 33, 65, 129, 8), (5, 2, 200, 3, 1), (16, 8, 16, 16, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_table(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, d, p, targets = shape
    a, b = drawn(B, T, d, seed=1, dtype=dtype), drawn(B, T, p, seed=2, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    against_einsum(a, b, drawn(targets, p, d, seed=3, dtype=wide))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 80), st.integers(1, 80), st.integers(1, 3),
    st.sampled_from(kernel.TILES), st.integers(1, 5), st.sampled_from(["float64", "bfloat16"]),
)  # fmt: skip
def test_any_shape_tile_and_share(
    B: int, T: int, d: int, p: int, targets: int, tile: Any, share: int, name: str
) -> None:
    dtype = getattr(torch, name)
    a, b = drawn(B, T, d, seed=B, dtype=dtype), drawn(B, T, p, seed=T, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "TILES", (tile,))
        patch.setattr(kernel, "_parts", lambda a, P: (-(-len(a) // share), share))
        against_einsum(a, b, drawn(targets, p, d, seed=d))


LAYOUTS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "positions first": lambda B, T, d, seed: drawn(T, B, d, seed=seed).transpose(0, 1),
    "columns apart": lambda B, T, d, seed: drawn(B, T, 2 * d, seed=seed)[:, :, ::2],
    "columns first": lambda B, T, d, seed: drawn(B, d, T, seed=seed).mT,
    "the same for all": lambda B, T, d, seed: drawn(1, T, d, seed=seed).expand(B, T, d),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_copy_is_needed(name: str) -> None:
    """Whatever the strides, the tensors are read where they are."""
    lay = LAYOUTS[name]
    against_einsum(lay(3, 5, 20, 1), lay(3, 5, 11, 2), lay(2, 11, 20, 3))


def test_numbers_of_nobody_are_not_read() -> None:
    """Beyond the edges of a slice lies what is not a number."""
    full = [torch.full((4, 9, 40), float("nan"), dtype=torch.float64) for _ in range(3)]
    a, b, G = full[0][:3, :5, :20], full[1][:3, :5, :11], full[2][:2, :, :20][:, :5]
    for x, seed in ((a, 1), (b, 2)):
        x.copy_(drawn(*x.shape, seed=seed))
    G = torch.full((3, 13, 24), float("nan"), dtype=torch.float64)[:2, :11, :20].copy_(
        drawn(2, 11, 20, seed=3)
    )
    against_einsum(a, b, G)


def test_as_an_operation() -> None:
    """What torch itself asks of an operation: its schema, its shapes without data, its place in a compiled graph."""
    a, b, G = drawn(3, 5, 20, seed=1), drawn(3, 5, 11, seed=2), drawn(2, 11, 20, seed=3)
    a = a.transpose(0, 1).contiguous().transpose(0, 1)  # positions first
    torch.library.opcheck(torch.ops.assay.weight_gradient_and_products.default, (a, b, G))


def test_where_it_fails_the_batched_form_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no registers left\nand much more")

    monkeypatch.setattr(kernel, "launch", broken)
    monkeypatch.setattr(fused, "_found_sound", {})
    a, b, G = drawn(3, 5, 20, seed=1), drawn(3, 5, 11, seed=2), drawn(2, 11, 20, seed=3)
    with pytest.warns(AssayWarning, match="RuntimeError: no registers left[)]"):
        against_einsum(a, b, G)
    against_einsum(a, b, G)  # without a word, and without another try
    assert not fused.available(a, b)


# --- in a capture


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every use that the kernel can take is given to it; how often it was run."""
    runs: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return launch(*args, **kwargs)

    launch = kernel.launch
    monkeypatch.setattr(kernel, "launch", counted)
    monkeypatch.setattr(contraction, "cheapest", lambda *sizes: "fused" if sizes[-1] else "directional")
    yield runs
    assert runs


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    "name",
    ["mlp_tokens", "sequence_first", "two_modules_one_weight"],
)
def test_values_are_the_dense_ones(name: str) -> None:
    case = CASES[name]
    loss = list(case.losses.values())[-1]
    targets = {f"target {n}": Target([case.batch(n + 1, seed=30 + n)], loss) for n in range(2)}
    check(case, loss, OPTIMIZERS["sgd_momentum"], plan(case, sizes=(4, 3)), targets, CLIP)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral"])
def test_architectures(family: str) -> None:
    model, inputs = build(family)
    doubled = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    outcome = compare(model.double(), doubled)
    assert max(outcome.samples, outcome.total) < 1e-9, outcome


def step(model: nn.Module, called: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
    """The values of one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = assay.Target([(x[:2], y[:2])], lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    with assay.Run(model, optimizer, methods=[assay.InRunShapley(target)], check="off") as run:
        with run.step(range(len(x))):
            F.cross_entropy(called(x), y).backward()
        optimizer.step()
    return torch.tensor(run.ledger.steps()["value"].to_list(), dtype=torch.float64)


def test_in_a_compiled_model(chosen: list[int]) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).double()

    x, y = drawn(5, 6, seed=1), torch.tensor([0, 1, 2, 0, 1])
    eager = net()
    found = step(eager, eager, x, y)
    chosen.clear()
    compiled = net()
    torch.testing.assert_close(step(compiled, torch.compile(compiled, backend="aot_eager"), x, y), found)
    assert len(chosen) == 2  # one for each layer, out of the compiled graph


def test_rows_in_no_regular_order_are_left_to_the_other_forms() -> None:
    a, b, G = drawn(6, 4, seed=1), drawn(6, 3, seed=2), drawn(1, 3, 4, seed=3)
    labels = torch.tensor([0, 1, 1, 0, 2, 1])
    total, scores = contraction.weight_gradient_and_products(a, b, Layout(0, 3, 1, labels), G)
    torch.testing.assert_close(total, b.t() @ a)
    truth = torch.zeros(3, dtype=torch.float64).index_add(0, labels, torch.einsum("rp,rd,pd->r", b, a, G[0]))
    torch.testing.assert_close(scores[0], truth)
