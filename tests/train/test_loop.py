"""The training command trains, values every document, and keeps what it has when it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import assay
from assay.demo import GPT, GPTConfig
from assay.errors import StoreError
from assay.train import Config, Progress, train
from assay.train.loop import make_optimizer
from assay.train.overhead import OverheadMeter


@pytest.fixture
def configure(texts: Path, tmp_path: Path) -> Any:
    """A configuration of a run that takes a second, with some keys replaced."""

    def configure(**sections: Any) -> Config:
        content: dict[str, Any] = {
            "out": tmp_path / "run",
            "data": {"path": texts, "id": "id"},
            "model": {"vocabulary": 300, "context": 32, "layers": 1, "heads": 2, "width": 16},
            "targets": {"by": "domain", "values": ["bible", "novels"], "documents": 2},
            "train": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3},
            "attribution": {"measure_every": 0},
        }
        for name, value in sections.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) else value
        return Config.model_validate(content)

    return configure


def test_every_document_is_valued_and_no_held_out_one(configure: Any, texts: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = train(configure(data={"long": "cut"}), seen.append)
    ledger = assay.open(tmp_path / "run")
    values = ledger.values("bible")
    everything = set(pl.read_ndjson(texts)["id"])
    assert set(values["id"]) == set(result.documents["id"])
    assert len(everything - set(values["id"])) == 4
    assert values["steps"].unique().to_list() == [2]  # one row per document and epoch
    assert (values["value"] != 0).all()
    assert [at.step for at in seen] == list(range(1, 15))
    assert ledger.account("novels")["step"].to_list() == list(range(14))
    assert seen[-1].steps == result.steps == 14
    assert seen[-1].loss < seen[0].loss - 0.2


def test_the_account_closes_when_steps_are_small(configure: Any) -> None:
    ledger = train(configure(train={"learning_rate": 1e-4, "epochs": 1})).ledger
    assert ledger.explained("bible") == pytest.approx(1, abs=0.02)
    assert ledger.explained("novels") == pytest.approx(1, abs=0.02)


def test_metadata_and_settings_stay_with_the_run(configure: Any, tmp_path: Path) -> None:
    config = configure(seed=3, train={"epochs": 1})
    train(config)
    ledger = assay.open(tmp_path / "run")
    assert set(ledger.metadata().columns) == {"id", "domain", "source", "license", "text"}
    groups = ledger.by("domain", "bible")
    assert groups["value"].sum() == pytest.approx(ledger.values("bible")["value"].sum())
    assert Config.model_validate(ledger.info["config"]) == config
    assert ledger.info["seed"] == 3
    assert ledger.info["versions"]["torch"] == torch.__version__
    curve = ledger.table("curve")
    assert curve["step"].to_list() == ledger.account("bible")["step"].to_list()
    assert (curve["loss"] > 0).all()
    assert (tmp_path / "run" / "model" / "weights.pt").is_file()


def test_a_long_document_is_one_document(configure: Any) -> None:
    result = train(configure(train={"epochs": 1, "batch_size": 4}))
    values = result.ledger.values("bible")
    assert set(values["id"]) == set(result.documents["id"])
    assert values["steps"].max() > 1  # several rows, hence several steps


def test_the_same_seed_gives_the_same_values(configure: Any, tmp_path: Path) -> None:
    def values(**sections: Any) -> pl.DataFrame:
        return train(configure(**sections)).ledger.values("bible").sort("id")

    first = values(out=tmp_path / "a")
    assert first.equals(values(out=tmp_path / "b"))
    assert not first.equals(values(out=tmp_path / "c", seed=1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_measuring_the_overhead_changes_nothing(
    configure: Any, tiny_gpt2: Path, tmp_path: Path, accumulate: int
) -> None:
    def run(name: str, every: int) -> Any:
        model = {"name": str(tiny_gpt2), "context": 32}  # with dropout: the random state matters
        config = configure(
            out=tmp_path / name,
            attribution={"measure_every": every},
            train={"epochs": 1, "accumulate": accumulate},
        )
        return train(config.model_copy(update={"model": type(config.model)(**model)}))

    plain, measured = run("plain", 0), run("measured", 1)
    assert plain.overhead is None
    assert measured.comparisons == measured.steps - 2
    assert measured.overhead is not None
    assert plain.ledger.steps("bible").equals(measured.ledger.steps("bible"))


def test_accumulated_steps(configure: Any) -> None:
    result = train(configure(train={"epochs": 1, "accumulate": 3}, data={"long": "cut"}))
    steps = result.ledger.steps("bible")
    assert steps["step"].unique().to_list() == [0, 1, 2]
    assert steps.group_by("step").len().sort("step")["len"].to_list() == [24, 24, 8]


def test_targets_of_ones_own_and_fewer_steps(configure: Any, texts: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "In the beginning God created the heaven and the earth."}\n')
    config = configure(targets={"by": None, "values": None, "files": {"genesis": mine}}, train={"steps": 3})
    result = train(config)
    assert result.targets == ["genesis"]
    assert result.steps == result.ledger.account("genesis").height == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_recorded_survives_the_end_of_a_run(configure: Any, tmp_path: Path, error: type) -> None:
    def stop(at: Progress) -> None:
        if at.step == 3:
            raise error

    if error is KeyboardInterrupt:
        result = train(configure(), stop)
        assert result.interrupted
    else:
        with pytest.raises(RuntimeError):
            train(configure(), stop)
    account = assay.open(tmp_path / "run").account("bible")
    assert account["step"].to_list() == [0, 1, 2]
    assert account["status"].unique().to_list() == ["ok"]


def test_a_second_run_does_not_overwrite_the_first(configure: Any, tmp_path: Path) -> None:
    before = train(configure(train={"epochs": 1})).ledger.values("bible")
    with pytest.raises(StoreError, match="already holds a run"):
        train(configure(seed=1, train={"epochs": 1}))
    assert assay.open(tmp_path / "run").values("bible").equals(before)


def test_the_schedule_warms_up_and_decays() -> None:
    model = GPT(GPTConfig(vocabulary=10, context=4, layers=1, heads=1, width=8))
    config = Config.model_validate({"out": "o", "data": {"path": "p"}}).train
    optimizer, scheduler = make_optimizer(model, config, steps=100)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_the_meter_compares_with_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))  # every plain pass takes two seconds
    monkeypatch.setattr("assay.train.overhead.time.perf_counter", lambda: float(next(clock)))
    model = torch.nn.Linear(1, 1)
    meter = OverheadMeter(model, every=5)
    assert [step for step in range(13) if meter.due(step)] == [2, 7, 12]
    assert not any(OverheadMeter(model, every=0).due(step) for step in range(9))
    calls: list[str] = []
    for kind in ("before", "after", "before"):
        meter.before(lambda: calls.append("before"), torch.device("cpu"))
        meter.after(lambda: calls.append("after"), torch.device("cpu"), step=4.0, update=0.5)
        assert calls.pop() == kind
        assert not calls
    assert meter.overhead == pytest.approx(4 / 2.5 - 1)
    assert meter.seconds == 6
