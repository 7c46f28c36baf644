"""The performance page says what its JSON says, and the two direct methods are what the others are measured against."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import assay


@pytest.fixture
def performance(benchmark_of: Callable[[str], Any]) -> Any:
    return benchmark_of("performance")


def test_the_page_is_made_from_the_results(performance: Any) -> None:
    page = performance.performance_page
    document, gpu = page.documents()
    assert page.PAGE.read_text(encoding="utf-8") == page.page(document, gpu), (
        "run benchmarks/performance.py --page"
    )
    assert page.PLOT.read_text(encoding="utf-8") == page.plot(document), (
        "run benchmarks/performance.py --page"
    )


def test_the_tables_of_a_gpu_run_at_tiny_size(performance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: every arm of both models, one of which is too large for the device."""
    gpu, page = performance.gpu, performance.performance_page
    alone = gpu.arm

    def arm(shape: Any, called: Any, optimizer: str, kind: str, device: torch.device) -> Any:
        if (shape.family, kind) == ("llama", "assay left@4"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB.")
        return alone(shape, called, optimizer, kind, device)

    monkeypatch.setattr(gpu, "arm", arm)
    options = Namespace(device="cpu", quick=True, rounds=2, warmup=1)
    document = {"machine": {"gpu": "none", "torch": torch.__version__}, **gpu.measure(options)}
    measured = {(row["family"], row["optimizer"], row["arm"]) for row in document["rows"] if "seconds" in row}
    assert measured == {
        *(("gpt2", "sgd", arm) for arm in gpu.ARMS),
        *(("llama", "sgd", arm) for arm in gpu.ARMS[:3]),
    }
    assert "did not run | OutOfMemoryError: CUDA out of memory" in page.on_a_gpu(document)
    assert page.on_a_gpu(None) in page.PAGE.read_text(encoding="utf-8") or page.documents()[1]


def test_a_line_is_found(performance: Any) -> None:
    found = performance.line([1, 2, 4], [5.0, 7.0, 11.0])
    assert found == pytest.approx({"slope": 2.0, "intercept": 3.0, "r2": 1.0})


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_all_arms_measure_the_same_values(performance: Any, family: str) -> None:
    """One sample at a time, `torch.func` and assay's first order agree, so that their times can be compared."""
    size = performance.Size(3, 8, 16, 1)
    make = performance.llama if family == "llama" else lambda s: performance.overhead.build(s, "gpt")[0]
    loss_fn = performance.overhead.hugging_face_loss if family == "llama" else performance.overhead.lm_loss
    generator = torch.Generator().manual_seed(3)
    batch, held_out = (torch.randint(512, (n, 9), generator=generator) for n in (3, 1))
    model = make(size)
    directions = [list(torch.autograd.grad(loss_fn(model, held_out), list(model.parameters())))]
    found = [
        way(model, loss_fn, batch, directions, lambda: model.zero_grad())[0]
        for way in (performance.one_by_one, performance.by_functions)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = performance.method("assay", [held_out], loss_fn)
    with assay.Run(model, optimizer, methods=[method]) as run:
        with run.step([0, 1, 2]):
            loss_fn(model, batch).backward()
        optimizer.step()
    values = torch.tensor(run.ledger.steps()["value"].to_list(), dtype=torch.float32)
    for way in found:
        torch.testing.assert_close(way, values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["opacus", "dattri-llm"])
def test_a_peer_measures_what_its_row_says(performance: Any, name: str) -> None:
    """Norms or inner products of the samples' gradients, and the gradient that the plain step has."""
    peers = performance.peers
    if name not in peers.installed():
        pytest.skip(f"{name} is not installed")
    size = performance.Size(3, 8, 16, 1)
    generator = torch.Generator().manual_seed(3)
    batch, held_out = (torch.randint(512, (n, 9), generator=generator) for n in (3, 1))
    model, loss_fn = peers.untied(size)
    found = peers.measured(name, model, loss_fn, batch, held_out)()
    own = [p.grad.clone() for p in model.parameters()]
    plain, _ = peers.untied(size)
    params = list(plain.parameters())
    target = torch.autograd.grad(loss_fn(plain, held_out), params)
    each = [torch.autograd.grad(loss_fn(plain, batch[n : n + 1]), params) for n in range(3)]
    expected = [
        performance.dot(g, g).sqrt() if name == "opacus" else performance.dot(g, target) / 3 for g in each
    ]
    torch.testing.assert_close(found.flatten(), torch.stack(expected), rtol=1e-4, atol=1e-6)
    for a, b in zip(own, torch.autograd.grad(loss_fn(plain, batch), params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_quick(performance: Any, tmp_path: Path) -> None:
    out = tmp_path / "performance.json"
    threads = torch.get_num_threads()
    try:
        performance.main(["--quick", "--threads", "1", "--warmup", "1", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    document = json.loads(out.read_text())
    arms = {(row["optimizer"], row["arm"]) for row in document["rows"] if row["table"] == "main"}
    named = {*performance.FIRST, *performance.FURTHER, *performance.peers.installed()}
    assert arms == {(o, a) for o in ("sgd", "adamw") for a in named}
    assert set(document["left_out"]) == {*performance.peers.left_out()}
    assert [found["along"] for found in document["slopes"]] == ["samples", "tokens", "targets"]
    assert performance.performance_page.page(document).startswith("# Performance")
    assert Namespace(**document["machine"]).threads == 1
