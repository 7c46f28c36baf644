"""`assay evaluate`: the training that it repeats is the run's own, and what it says follows from the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from assay.cli import main
from assay.errors import InputError, StoreError
from assay.evaluate.compare import Compared
from assay.train import Config, train
from assay.train.evaluation import Evaluation, advice, document_losses, evaluate, quick_form, task_of


def config(texts: Path, out: Path, **more: Any) -> Config:
    return Config(
        out=out,
        data={"path": texts, "limit": 40},  # type: ignore[arg-type]
        model={"vocabulary": 300, "context": 24, "layers": 1, "heads": 2, "width": 16},  # type: ignore[arg-type]
        targets={"documents": 3},  # type: ignore[arg-type]
        train={"epochs": 2, "batch_size": 8, "accumulate": 2, "learning_rate": 1e-2, **more},  # type: ignore[arg-type]
    )


def test_the_training_is_that_of_the_run(texts: Path, tmp_path: Path) -> None:
    settings = config(texts, tmp_path / "run")
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"long": "cut"})})
    result = train(settings)
    task, _ = task_of(settings)
    weights = torch.load(tmp_path / "run" / "model" / "weights.pt", weights_only=True)
    ours = document_losses(task.trained.model, task.data)
    task.trained.model.load_state_dict(
        weights
    )  # but for biases without effect, where Adam makes steps of rounding
    torch.testing.assert_close(ours, document_losses(task.trained.model, task.data), rtol=1e-5, atol=1e-6)
    assert task.examples == len(result.documents)
    from assay.cli.evaluate import _settings

    again = _settings(
        Console(), tmp_path / "run", False, ["train.epochs=3"]
    )  # the run's folder says what it was
    assert again.train == settings.train.model_copy(update={"epochs": 3})
    assert _settings(Console(), tmp_path / "run", True, None).train.epochs == 1


def test_a_half_is_trained_in_the_order_of_the_whole(texts: Path, tmp_path: Path) -> None:
    task, setup = task_of(config(texts, tmp_path / "run", epochs=1))
    everything = torch.ones(1, task.examples, dtype=torch.bool)
    found = task.loop.retrain(everything, task.queries, document_losses)
    truth = document_losses(task.trained.model, task.queries).detach()
    torch.testing.assert_close(found[0, 0], truth.double(), rtol=1e-5, atol=1e-6)
    kept = torch.arange(task.examples) % 2 == 0
    watched = task.loop.train_on(kept, setup.config.seed)  # type: ignore[attr-defined]
    seen = [i for t in range(setup.steps) for ids, _ in watched.batches_of_step(t) for i in ids]
    assert sorted(seen) == kept.nonzero().flatten().tolist()
    order = [i for t in range(setup.steps) for ids, _ in task.trained.batches_of_step(t) for i in ids]
    assert seen == [i for i in order if kept[i]]


def test_evaluating_says_who_is_better_than_chance(texts: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = evaluate(
        config(texts, tmp_path / "run"), subsets=6, quick=True, cache=tmp_path / "cache", say=lines.append
    )
    names = {row.name for row in found.rows} | set(found.failed)
    assert {"random", "in-run, left", "in-run, trapezoid", "LoGra", "BM25", "length of the document"} <= names
    assert not found.failed
    assert [row.lds for row in found.rows] == sorted((row.lds for row in found.rows), reverse=True)
    assert all(-1 <= row.low <= row.high <= 1 for row in found.rows)
    assert "37 documents" in lines[0]
    assert "minutes" in lines[0]
    again = evaluate(config(texts, tmp_path / "run"), subsets=6, quick=True, cache=tmp_path / "cache")
    assert {r.name: r.lds for r in again.rows} == pytest.approx({r.name: r.lds for r in found.rows}, abs=1e-6)
    assert not (tmp_path / "run").exists()


def test_a_cache_is_of_one_measure_and_one_model(texts: Path, tmp_path: Path) -> None:
    task, setup = task_of(config(texts, tmp_path / "run", epochs=1))
    everything = torch.ones(1, task.examples, dtype=torch.bool)
    known = task.loop.retrain(everything, task.queries, document_losses, cache=tmp_path / "cache")
    with pytest.raises(StoreError, match=r"other data or settings \(measure\)"):
        task.loop.retrain(
            everything,
            task.queries,
            lambda model, rows: 2 * document_losses(model, rows),
            cache=tmp_path / "cache",
        )
    assert torch.equal(
        task.loop.retrain(everything, task.queries, document_losses, cache=tmp_path / "cache"), known
    )
    with torch.no_grad():
        next(setup.model.parameters()).mul_(2)
    with pytest.raises(StoreError, match=r"other data or settings \(model\)"):
        task.loop.retrain(everything, task.queries, document_losses, cache=tmp_path / "cache")


def evaluation(*rows: Compared) -> Evaluation:
    return Evaluation(list(rows), {}, 40, ["held_out"], 32, 100.0, 500.0)


def test_advice_follows_from_the_table() -> None:
    path = Compared("in-run, trapezoid", 0.5, 0.3, 0.7, 90.0, False)
    words = Compared("BM25", 0.45, 0.2, 0.6, 1.0, False)
    chance = Compared("random", 0.1, -0.2, 0.3, 0.0, True)
    assert advice(evaluation(path, chance)).startswith("Take in-run, trapezoid (attribution.path: trapezoid)")
    assert "the best." in advice(evaluation(path, chance))
    simple = advice(evaluation(path, words, chance))
    assert simple.startswith(
        "Take BM25: LDS 0.45, which is not shown to be worse than in-run, trapezoid (0.50)"
    )
    assert "a simple baseline does as well" in simple
    assert "the best of assay's own is in-run, trapezoid" in simple
    assert "None of these can be told from chance by 32" in advice(evaluation(chance))


def test_quick_makes_a_run_smaller_and_never_larger(texts: Path, tmp_path: Path) -> None:
    small = quick_form(config(texts, tmp_path / "run"))
    assert (small.data.limit, small.train.epochs, small.targets.documents) == (40, 1, 3)
    assert quick_form(Config(out=tmp_path, data={"path": texts})).data.limit == 96  # type: ignore[arg-type]


def test_bad_input_is_a_line(texts: Path, tmp_path: Path) -> None:
    settings = config(texts, tmp_path / "run")
    with pytest.raises(InputError, match="--subsets 4: nothing can be said of fewer than 5"):
        evaluate(settings, subsets=4)
    few = settings.model_copy(update={"data": settings.data.model_copy(update={"limit": 8})})
    with pytest.raises(InputError, match="5 documents are too few"):
        evaluate(few, subsets=6)


def test_the_command(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "table.json"
    file.write_text(
        f"data: {{path: {texts}, limit: 30}}\n"
        "model: {vocabulary: 300, context: 16, layers: 1, heads: 2, width: 16}\n"
        "targets: {documents: 2}\n"
        "train: {batch_size: 8, learning_rate: 1.0e-2}\n"
    )

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["evaluate", *map(str, arguments)])
        return int(left.value.code or 0), *capsys.readouterr()

    status, text, err = run(file, "--quick", "--subsets", 5, "--out", out, "--set", "train.epochs=1")
    assert (status, err) == (0, "")
    assert "above random?" in text
    assert "LDS of 28 documents for held_out" in " ".join(text.split())
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["advice"].split()[0] in ("Take", "None")
    assert {"name", "lds", "low", "high", "seconds", "behind"} == set(found["rows"][0])
    status, _, err = run(tmp_path / "nothing.yaml")
    assert (status, err.count("\n")) == (1, 1)
    assert "name a configuration, or the folder of a run" in err
    status, _, err = run(file, "--subsets", 3)
    assert (status, err.count("\n")) == (1, 1)
    status, _, err = run(tmp_path)
    assert (status, err.count("\n")) == (1, 1)
