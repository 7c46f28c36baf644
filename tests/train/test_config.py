"""A configuration is read, or the reader is told which line to change and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from assay.demo import CORPUS, SETTINGS
from assay.errors import InputError
from assay.train import load_config


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_least_configuration(write: Any) -> None:
    config = load_config(write("out: runs/mine\ndata:\n  path: texts\n"))
    assert config.data.path == Path("texts")
    assert config.train.betas == (0.9, 0.95)
    assert (config.train.weight_decay, config.train.clip) == (0.1, 1.0)


def test_numbers_in_scientific_notation(write: Any) -> None:
    config = load_config(write("out: o\ndata: {path: t}\ntrain: {learning_rate: 3e-4, clip: null}\n"))
    assert config.train.learning_rate == 3e-4
    assert config.train.clip is None


def test_overrides_win(write: Any) -> None:
    path = write("out: o\ndata: {path: t}\ntrain: {epochs: 3}\n")
    config = load_config(path, {"train.epochs": 1, "model.layers": 2, "out": Path("p")})
    assert (config.train.epochs, config.model.layers, config.out) == (1, 2, Path("p"))


def test_the_demo_is_a_configuration() -> None:
    config = load_config(SETTINGS, {"out": "o", "data.path": CORPUS})
    assert config.targets.values is not None
    assert len(config.targets.values) >= 3


GOOD = "out: o\ndata:\n  path: t\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD + "train:\n  epoch: 3\n",
            "mine.yaml, line 5: unknown key 'train.epoch'; did you mean 'train.epochs'?",
        ),
        (GOOD + "epochs: 3\n", "line 4: unknown key 'epochs'; did you mean 'train.epochs'?"),
        (GOOD + "quux: 3\n", "line 4: unknown key 'quux'; valid here: out, seed, device, data"),
        (GOOD + "seed: one\n", "line 4: seed: input should be a valid integer"),
        (GOOD + "train: {batch_size: 0}\n", "line 4: train.batch_size: input should be greater than"),
        (GOOD + "train: [1]\n", "line 4: train: input should be a valid dictionary"),
        (GOOD + "seed: -1\ntrain: {epochs: x}\n", "(and 1 more)"),
        ("data: {path: t}\n", "mine.yaml: the key 'out' is missing"),
        ("out: o\ndata: {}\n", "line 2: give either data.path or data.dataset"),
        ("out: o\ndata: {path: t, dataset: d}\n", "give either data.path or data.dataset"),
        (
            GOOD + "model: {width: 100, heads: 3}\n",
            "line 4: model.width 100 is not a multiple of model.heads 3",
        ),
        (GOOD + "model: {name: gpt2, layers: 2}\n", "model.layers belongs to the built-in model"),
        (GOOD + "targets: {values: [a]}\n", "targets.values needs targets.by"),
        (GOOD + "targets: {by: a, files: {x: y}}\n", "give either targets.by or targets.files"),
        (GOOD + "  x: [\n", "mine.yaml, line 5"),
        ("just text\n", "holds no configuration"),
        ("", "holds no configuration"),
    ],
)
def test_what_a_mistake_is_told(write: Any, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(write(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_override_is_not_blamed_on_a_line(write: Any) -> None:
    with pytest.raises(InputError, match=r"mine\.yaml: train\.epochs: "):
        load_config(write(GOOD + "train: {epochs: 2}\n"), {"train.epochs": "many"})
    with pytest.raises(InputError, match="out is not a section"):
        load_config(write(GOOD), {"out.x": 1})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"out: caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")
