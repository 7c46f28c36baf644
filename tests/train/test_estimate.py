"""What is planned is what is then trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from assay.cli.app import main
from assay.demo import CORPUS, SETTINGS
from assay.train import Config, estimate, load_config, train
from assay.train.loop import prepare

SMALL = {
    "data.path": CORPUS,
    "data.limit": 60,
    "model.vocabulary": 300,
    "model.width": 32,
    "model.layers": 2,
    "model.context": 64,
    "targets.documents": 1,
    "targets.tokens": 32,
    "train.batch_size": 4,
    "train.accumulate": 2,
    "attribution.measure_every": 0,
}


def config(out: Path, **more: object) -> Config:
    return load_config(SETTINGS, SMALL | {"out": out} | {k.replace("_", ".", 1): v for k, v in more.items()})


@pytest.mark.parametrize(
    "more", [{"train_epochs": 2}, {"train_epochs": 1, "train_steps": 3}], ids=["epochs", "steps"]
)
def test_steps_rows_and_parameters(more: dict[str, object], tmp_path: Path) -> None:
    settings = config(tmp_path / "run", **more)
    planned = estimate(settings, speed=1e9)
    assert not (tmp_path / "run").exists()
    result = train(settings)
    assert planned.steps == result.steps
    assert planned.parameters == sum(p.numel() for p in prepare(settings).model.parameters())
    assert len(result.ledger.steps(result.targets[0])) == pytest.approx(planned.samples, abs=4)
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "values").iterdir())
    assert size < 4 * planned.methods["in-run values, trapezoid"].disk + 8000  # few rows: mostly headers


def test_a_faster_device_takes_less_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "c.yaml"
    settings.write_text(f"out: {tmp_path / 'run'}\ndata: {{path: {CORPUS}, id: id, limit: 40}}\n")

    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exited:
            main(
                [
                    "plan",
                    str(settings),
                    "--set",
                    "model.width=32",
                    "--set",
                    "model.vocabulary=300",
                    *arguments,
                ]
            )
        assert exited.value.code == 0
        return capsys.readouterr().out

    assert "1 TFLOP/s as given" in shown("--tflops", "1")
    measured = shown()
    assert "seen here" in measured
    assert "adjoint" in measured
