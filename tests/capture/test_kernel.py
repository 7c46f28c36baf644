"""The fused kernel: in Triton's interpreter, compiled for GPUs that are not here, and on one where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.capture import contraction, fused
from assay.capture.layout import Layout

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is made for Linux")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a CUDA GPU and Triton"
)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """`interpreted.py` in a process of its own, in which Triton was told to interpret before it was imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpreted.py"),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.parametrize(
    ("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")], ids=str
)
def test_compiles_for_gpus(capability: int, instruction: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Down to the machine code of an A100, an H100 and a B200, with the instructions of their tensor cores."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from assay.capture import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    body = kernel.weight_gradient_and_products
    block_p, block_d, block_t, warps, stages = kernel.TILES[0]
    constants: dict[str, Any] = {
        "BLOCK_P": block_p, "BLOCK_D": block_d, "BLOCK_T": block_t, "SUM": tl.float32, "PRECISION": "ieee",
        "WIDEN": False, "a_column": 1, "b_column": 1, "g_column": 1,
    }  # fmt: skip
    pointers = {"a": "*bf16", "b": "*bf16", "totals": "*bf16", "directions": "*fp32", "scores": "*fp32"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in body.arg_names
    }
    made = triton.compile(
        ASTSource(fn=body, signature=signature, constexprs=constants, attrs={}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert instruction in made.asm["ptx"]
    assert len(made.asm["cubin"])


def test_without_triton_or_a_gpu_the_other_forms_do(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    assert not fused.available(a, b)
    monkeypatch.setattr(contraction, "fused", None)
    total, scores = contraction.weight_gradient_and_products(a, b, Layout(0, 2), torch.ones(1, 5, 4))
    assert total.shape == (5, 4)
    torch.testing.assert_close(scores, torch.full((1, 2), 60.0))


def test_the_cost_model_decides_on_a_gpu() -> None:
    """By the constants that are shipped: in 16 bits the kernel, in float32 without tensor cores the library."""
    size = 16, 1024, 768, 768, 1
    assert contraction.cheapest(*size, "cuda half", True) == "fused"
    assert contraction.cheapest(*size, "cuda half", False) != "fused"
    assert contraction.cheapest(*size, "cuda", True) == "batched"
    assert contraction.cheapest(16, 1, 768, 768, 1, "cuda half", True) in ("fused", "directional")


# --- where there is a GPU


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to("cuda", dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 37, 45, 70, 2), (1, 1, 8, 8, 1), (16, 256, 768, 768, 1), (4, 100, 320, 1000, 3)], ids=str
)
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from assay.capture.kernel import launch

    B, T, d, p, targets = shape
    a, b, G = (
        drawn(B, T, d, seed=1, dtype=dtype),
        drawn(B, T, p, seed=2, dtype=dtype),
        drawn(targets, p, d, seed=3),
    )
    each = torch.einsum("btp,btd->bpd", b.double(), a.double())
    truth = torch.einsum("bpd,npd->nb", each, G.double())
    for tune in (False, True):
        total, scores = launch(a, b, G, "ieee", tune=tune)
        low = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert float((total.double() - each.sum(0)).norm() / each.sum(0).norm()) < low
        assert float((scores.double() - truth).norm() / truth.norm()) < 1e-5
    assert fused._sound(a)


@needs_gpu
def test_in_a_cuda_graph() -> None:
    """Recorded once, run again on other numbers."""
    a, b, G = (
        drawn(*shape, seed=1, dtype=torch.bfloat16) for shape in ((4, 64, 96), (4, 64, 80), (1, 80, 96))
    )
    fused.fused(a, b, G)  # its check and its tiles are found out before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, scores = fused.fused(a, b, G)
    a.copy_(drawn(4, 64, 96, seed=5, dtype=torch.bfloat16))
    graph.replay()
    expected = fused.fused(a, b, G)
    torch.testing.assert_close(total, expected[0])
    torch.testing.assert_close(scores, expected[1])


@needs_gpu
def test_a_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every use by the kernel, eagerly and compiled with recorded graphs, against the directional form."""
    import assay

    def values(form: str, compiled: bool) -> Tensor:
        monkeypatch.setattr(contraction, "cheapest", lambda *sizes: form)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8)).cuda()
        called = torch.compile(net, mode="reduce-overhead") if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y = drawn(16, 20, 64, seed=1), drawn(16, 20, 8, seed=2)

        def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

        method = assay.InRunShapley(assay.Target([(x[:2], y[:2])], loss))
        with assay.Run(net, optimizer, methods=[method], check="off") as run:
            for _ in range(4):
                with run.step(range(16)):
                    loss(called, (x, y)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return torch.tensor(run.ledger.steps()["value"].to_list(), dtype=torch.float64)

    truth = values("directional", False)
    for compiled in (False, True):
        torch.testing.assert_close(values("fused", compiled), truth, rtol=1e-3, atol=1e-6)
