"""The cost model's constants: measured, kept, read again, and refused where they are no constants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from assay.capture import calibration, contraction
from assay.capture.contraction import SHIPPED, CostModel
from assay.cli.app import app
from assay.errors import AssayWarning


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ASSAY_CONFIG", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    contraction.cost_model.cache_clear()
    contraction.cheapest.cache_clear()


def test_the_command_keeps_constants_that_the_planner_then_reads(folder: Path) -> None:
    assert contraction.cost_model("cpu") == SHIPPED["cpu"]
    result = CliRunner().invoke(app, ["bench", "calibrate", "--quick"])
    assert result.exit_code == 0, result.output
    held = json.loads((folder / "contraction.json").read_text())["devices"]["cpu"]
    assert held["machine"]["torch"] == torch.__version__
    assert asdict(contraction.cost_model("cpu")) == held["constants"]
    assert contraction.cost_model("cuda") == SHIPPED["cuda"]


def test_constants_decide() -> None:
    sizes = (16, 16, 384, 384, 1)
    for entry, flop, form in ((1e-9, 1e-15, "directional"), (1e-12, 1e-9, "batched")):
        calibration.keep(CostModel(per_entry=entry, per_flop=flop), torch.device("cpu"))
        assert contraction.cheapest(*sizes) == form


def test_another_device_keeps_what_it_had() -> None:
    calibration.keep(CostModel(per_entry=3e-10), torch.device("cpu"))
    file = calibration.place()
    held = json.loads(file.read_text())
    held["devices"]["cuda"] = {"constants": asdict(CostModel(per_entry=5e-12)), "machine": {}}
    file.write_text(json.dumps(held))
    calibration.keep(CostModel(per_entry=4e-10), torch.device("cpu"))
    assert contraction.cost_model("cpu").per_entry == 4e-10
    assert contraction.cost_model("cuda").per_entry == 5e-12


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"devices": {"cpu": {}}}',
        '{"devices": {"cpu": {"constants": {"per_entry": 1}}}}',
        *(
            json.dumps({"devices": {"cpu": {"constants": {**asdict(CostModel()), "per_flop": value}}}})
            for value in (-1.0, 0, float("nan"), "fast", True)
        ),
    ],
)
def test_what_is_no_constant_is_left_with_a_warning(text: str, folder: Path) -> None:
    (folder / "contraction.json").write_text(text)
    with pytest.warns(AssayWarning, match="assay bench calibrate"):
        assert contraction.cost_model("cpu") == SHIPPED["cpu"]


def test_a_device_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["bench", "calibrate", "--quick", "--device", "nowhere"])
    assert result.exit_code != 0


@pytest.mark.parametrize("alone", [1, 1 << 30])
@pytest.mark.parametrize("block", [1, 3000, 1 << 30])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize(("p", "d"), [(4, 6), (6, 4)])
def test_every_block_size_is_the_same_product(block: int, alone: int, targets: int, p: int, d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    a, b, directions = draw(5, 7, d), draw(5, 7, p), draw(targets, p, d)
    total, products = contraction.batched(a, b, directions, CostModel(block_bytes=block, alone_bytes=alone))
    each = torch.einsum("btp,btd->bpd", b, a)
    torch.testing.assert_close(total, each.sum(0))
    torch.testing.assert_close(products, torch.einsum("bpd,npd->nb", each, directions))


@pytest.mark.parametrize("samples", [1, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_of_unequal_samples_are_rounded_as_sums_of_eight(
    samples: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    a, b, directions = draw(samples, 50, 40), draw(samples, 50, 60), draw(2, 60, 40)
    b[0] *= 1000
    each = torch.einsum("btp,btd->bpd", b.double(), a.double())
    _, products = contraction.batched(a, b, directions, CostModel(alone_bytes=1))
    exact = torch.einsum("bpd,npd->nb", each, directions.double())
    beside = [each[i - i % 8 : i + 1] if dtype == torch.float32 else each[i : i + 1] for i in range(samples)]
    sizes = torch.stack([run.norm(dim=(1, 2)).sum() for run in beside])  # a sample's own alone, for 16 bits
    bound = 2 * torch.finfo(dtype).eps * sizes * directions.double().norm(dim=(1, 2))[:, None]
    assert bool(((products.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(
    ("bytes_", "threads", "samples"), [(0, 2, 1), (5, 2, 4), (1, 2, 1), (2, 2, 2), (3, 4, 3), (9, 4, 8)]
)
def test_a_block_holds_as_many_samples_for_each_thread(
    bytes_: int, threads: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert CostModel(block_bytes=bytes_ * 24).samples_per_block(2, 3, 4) == samples
