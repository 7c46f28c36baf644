"""Any causal language model can be trained, and one that cannot be loaded is told in a line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from assay.demo import GPT
from assay.errors import InputError
from assay.train.batches import Row, make_batch
from assay.train.config import Model
from assay.train.model import build_model, pick_device, save_model, token_mean_loss
from assay.train.optional import require

TEXTS = ["to be or not to be", "that is the question"] * 5


def test_the_built_in_model_is_as_large_as_asked() -> None:
    model, tokenizer = build_model(Model(vocabulary=300, context=16, layers=1, heads=2, width=8), TEXTS)
    assert isinstance(model, GPT)
    assert model.token.weight.shape == (tokenizer.size, 8)
    assert model.position.weight.shape == (16, 8)


def test_a_pretrained_model_and_its_tokenizer(tiny_gpt2: Path) -> None:
    model, tokenizer = build_model(Model(name=str(tiny_gpt2), context=32), [])
    assert next(model.parameters()).dtype == torch.float32
    (tokens,) = tokenizer.encode(["to be"])
    assert tokens[0] == tokens[-1] == tokenizer.end
    assert len(tokens) > 2


def test_the_loss_of_a_pretrained_model_counts_tokens_not_rows(tiny_gpt2: Path) -> None:
    model = build_model(Model(name=str(tiny_gpt2), context=32), [])[0].double().eval()
    rows = [Row(0, [1, 2, 3, 4, 5, 6]), Row(1, [7, 8, 9])]
    losses = [token_mean_loss(model, make_batch([row])).item() for row in rows]
    together = token_mean_loss(model, make_batch(rows)).item()
    assert together == pytest.approx((5 * losses[0] + 2 * losses[1]) / 7, rel=1e-9)


def test_models_are_saved_as_their_library_expects(tiny_gpt2: Path, tmp_path: Path) -> None:
    model, tokenizer = build_model(Model(vocabulary=300, context=16, layers=1, heads=2, width=8), TEXTS)
    save_model(model, tokenizer, tmp_path / "own")
    weights = torch.load(tmp_path / "own" / "weights.pt", weights_only=True)
    model.load_state_dict(weights)
    assert (tmp_path / "own" / "tokenizer.json").is_file()

    model, tokenizer = build_model(Model(name=str(tiny_gpt2), context=32), [])
    save_model(model, tokenizer, tmp_path / "hub")
    again, _ = build_model(Model(name=str(tmp_path / "hub"), context=32), [])
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "./nowhere"}, "model.name: there is no folder ./nowhere"),
        ({"name": "no/such-model"}, "the model 'no/such-model' cannot be loaded"),
        ({"name": "{tiny}", "context": 65}, "model.context 65 is more than"),
    ],
)
def test_a_model_that_cannot_be(tiny_gpt2: Path, options: dict[str, Any], message: str) -> None:
    options["name"] = options["name"].format(tiny=tiny_gpt2)
    with pytest.raises(InputError) as error:
        build_model(Model(**options), [])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"cannot be loaded .*save_pretrained"):
        build_model(Model(name=str(tmp_path)), [])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'assay\[transformers\]'"):
        build_model(Model(name="gpt2"), [])
    with pytest.raises(InputError, match=r"no_such_thing is not installed: pip install 'assay\[train\]'"):
        require("no_such_thing.inside", "train")


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="the device 'nonsense' cannot be used"):
        pick_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="the device 'cuda' cannot be used"):
            pick_device("cuda")
