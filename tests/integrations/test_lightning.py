"""Lightning's Trainer with the callback against a plain loop over the same batches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import assay
from assay.errors import InputError
from assay.integrations.identity import content_id
from integrations.texts import pad

L = pytest.importorskip("lightning.pytorch")

from assay.integrations.lightning import AssayCallback  # noqa: E402


class Lit(L.LightningModule):  # type: ignore[misc,name-defined]
    """A language model; `whole` calls it through the module's own forward."""

    def __init__(self, model: nn.Module, whole: bool = False) -> None:
        super().__init__()
        self.model, self.whole = model, whole

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)

    def loss(self, batch: Any) -> torch.Tensor:
        batch = {k: v for k, v in batch.items() if k not in ("doc", "domain")}
        return (self(**batch) if self.whole else self.model(**batch)).loss

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, eps=1e-5)


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = pad([{k: e[k] for k in ("input_ids", "labels")} for e in examples])
    return {**batch, "doc": [e["doc"] for e in examples]}


def loss(module: Any, batch: Any) -> torch.Tensor:
    return module.loss(batch)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def fit(rows: Any, make_model: Any, tmp_path: Path) -> Any:
    def fit(callback: Any, module: Any = None, data: Any = None, **arguments: Any) -> tuple[Any, Any]:
        module = Lit(make_model()) if module is None else module
        loader = torch.utils.data.DataLoader(
            rows[:40] if data is None else data, 4, shuffle=True, collate_fn=collate if data is None else None,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        held_out = torch.utils.data.DataLoader(rows[40:], 4, collate_fn=collate) if data is None else None
        settings: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "default_root_dir": str(tmp_path),
            **arguments,
        }
        trainer = L.Trainer(**{"callbacks": [callback] if callback else [], **settings})
        trainer.fit(module, loader, held_out)
        return module, trainer

    return fit


def test_values_are_those_of_a_plain_loop(fit: Any, rows: Any, make_model: Any) -> None:
    for accumulate, whole in ((1, False), (3, True)):
        target = assay.Target([collate(rows[40:])], loss)
        callback = AssayCallback({"t": target}, ids="doc")
        module, _ = fit(
            callback, Lit(make_model(), whole), accumulate_grad_batches=accumulate, gradient_clip_val=0.5
        )
        ledger = callback.ledger
        plain = replay(rows, make_model(), ledger, accumulate)
        found, expected = ledger.steps(), plain[0].steps()
        assert found.select("step", "id").equals(expected.select("step", "id"))
        scale = expected["value"].abs().max()
        np.testing.assert_allclose(found["value"], expected["value"], rtol=2e-3, atol=1e-4 * scale)
        for a, b in zip(module.model.parameters(), plain[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert ledger.values()["steps"].unique().to_list() == [2]
        assert ledger.account()["status"].unique().to_list() == ["ok"]


def replay(rows: Any, model: Any, ledger: Any, accumulate: int) -> tuple[Any, Any]:
    by_name = {row["doc"]: row for row in rows}
    module = Lit(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    target = assay.Target([collate(rows[40:])], lambda _, batch: module.loss(batch))
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley({"t": target})])
    for step in ledger.steps().partition_by("step", maintain_order=True):
        for part in step.iter_slices(4):
            with run.step(part["id"]):
                (module.loss(collate([by_name[name] for name in part["id"]])) / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    return run.ledger, model


def test_training_and_validation_are_what_they_are_without(fit: Any, rows: Any) -> None:
    target = assay.Target([collate(rows[40:])], loss)
    found = []
    for callback, limit in ((None, 1.0), (AssayCallback(target, ids="doc", strict=True), 1.0)):
        module, trainer = fit(callback, limit_val_batches=limit, accumulate_grad_batches=2)
        found.append((module, dict(trainer.callback_metrics)))
    for a, b in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert found[0][1] == found[1][1]
    assert "val_loss" in found[0][1]


class Sum(L.LightningModule):  # type: ignore[misc,name-defined]
    """Layers called one by one, never the module itself; skips batches where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)
        self.skip: set[int] = set()

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.second(torch.tanh(self.first(batch[0]))), batch[1])

    def training_step(self, batch: Any, index: int) -> Any:
        return None if index in self.skip else self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_layers_that_are_called_one_by_one_and_batches_without_ids(fit: Any) -> None:
    data = [(torch.randn(3), torch.randn(1)) for _ in range(12)]
    target = assay.Target([(torch.randn(2, 3), torch.randn(2, 1))], loss)
    callback = AssayCallback(target, path="trapezoid")
    module = Sum()
    module.skip = {1}
    fit(callback, module, data)
    values = callback.ledger.values()
    assert set(values["id"]) <= {content_id([x, y]) for x, y in data}
    assert callback.ledger.account().height == 4  # of three batches in each epoch, one was skipped
    assert callback.ledger.explained() == pytest.approx(1, abs=0.05)


def llama() -> Any:
    import transformers

    transformers.set_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0,
        )
    )  # fmt: skip


class Part(Lit):
    """Trains only what is not frozen."""

    def configure_optimizers(self) -> Any:
        trained = [param for param in self.parameters() if param.requires_grad]
        return torch.optim.AdamW(trained, lr=3e-3, eps=1e-5)


@pytest.mark.parametrize("part", ["wpe", "h.1.mlp.c_fc", "layers.1.self_attn", "norm", "lm_head"])
def test_a_part_of_a_model_is_trained(fit: Any, rows: Any, make_model: Any, part: str) -> None:
    """That part's own inputs need not have a row per sample: positions, rotary tables."""

    def make() -> Any:
        model = make_model() if part in ("wpe", "h.1.mlp.c_fc") else llama()
        for name, param in model.named_parameters():
            param.requires_grad_(part in name)
        return model

    callback = AssayCallback({"t": assay.Target([collate(rows[40:])], loss)}, ids="doc")
    fit(callback, Part(make()), gradient_clip_val=0.5, max_epochs=1)
    expected = replay(rows, make(), callback.ledger, 1)[0].steps()["value"]
    np.testing.assert_allclose(
        callback.ledger.steps()["value"], expected, rtol=2e-3, atol=1e-4 * expected.abs().max()
    )


class Head(Part):
    """A head, trained on the rows of all samples together, behind a frozen model."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.requires_grad_(False))
        torch.manual_seed(1)
        self.head = nn.Linear(16, 256)

    def loss(self, batch: Any) -> torch.Tensor:
        inner = self.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits = self.head(inner.last_hidden_state[:, :-1].flatten(0, 1))
        return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())


def test_a_head_behind_a_frozen_model_is_trained(fit: Any, rows: Any) -> None:
    callback = AssayCallback(assay.Target([collate(rows[40:])], loss), ids="doc", path="trapezoid")
    fit(callback, Head(llama()), max_epochs=1)
    assert set(callback.ledger.values()["id"]) == {row["doc"] for row in rows[:40]}
    assert callback.ledger.explained() == pytest.approx(1, abs=0.05)


def test_padding_does_not_name_an_example(rows: Any) -> None:
    from assay.integrations.lightning import _content_ids

    alone = _content_ids({k: v for k, v in collate(rows[:1]).items() if k != "doc"})
    padded = _content_ids({k: v for k, v in collate(rows[:7]).items() if k != "doc"})
    assert alone[0] == padded[0]
    assert len(set(padded)) == 7


def test_numbers_reach_the_loggers(fit: Any, rows: Any, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    metadata = pl.DataFrame([{"id": row["doc"], "domain": row["domain"]} for row in rows[:40]])
    target = assay.Target([collate(rows[40:])], loss)
    callback = AssayCallback(
        {"t": target}, tmp_path / "run", ids="doc", metadata=metadata, group="domain", log_every=2
    )
    fit(callback, logger=CSVLogger(tmp_path, "log", "one"), log_every_n_steps=2)
    logged = pl.read_csv(tmp_path / "log" / "one" / "metrics.csv", infer_schema_length=None)
    ledger = assay.open(tmp_path / "run")
    last = logged.filter(pl.col("assay/explained/t").is_not_null()).tail(1)
    for domain, value, *_ in ledger.by("domain").iter_rows():
        assert last[f"assay/value/t/{domain}"][0] == pytest.approx(value, abs=0.1)
    assert ledger.table("curve").height >= 5


def test_an_error_leaves_a_whole_ledger(rows: Any, make_model: Any, tmp_path: Path) -> None:
    class Stop(L.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("stop")

    target = assay.Target([collate(rows[40:])], loss)
    callback = AssayCallback(target, tmp_path / "run", ids="doc")
    loader = torch.utils.data.DataLoader(rows[:40], 4, collate_fn=collate)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, Stop()],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(Lit(make_model()), loader)
    assert assay.open(tmp_path / "run").account()["status"].to_list() == ["ok", "ok", "ok"]


@pytest.mark.parametrize("first", [False, True])
def test_weights_put_in_at_the_end_of_training_change_nothing(
    fit: Any, rows: Any, make_model: Any, first: bool
) -> None:
    """The last step is settled before the averaged weights are there, wherever the callback stands in the list."""

    class Average(L.Callback):  # type: ignore[misc,name-defined]
        def on_train_end(self, trainer: Any, module: Any) -> None:
            with torch.no_grad():
                for param in module.parameters():
                    param.mul_(0.5)

    def train(others: list[Any]) -> Any:
        callback = AssayCallback(assay.Target([collate(rows[40:])], loss), ids="doc", path="trapezoid")
        callbacks = [callback, *others] if first else [*others, callback]
        fit(None, Lit(make_model()), max_steps=3, callbacks=callbacks)
        return callback.ledger

    plain, averaged = train([]), train([Average()])
    assert averaged.steps().equals(plain.steps())
    assert averaged.account().equals(plain.account())


def test_a_training_that_is_resumed_goes_on_in_the_same_folder(
    rows: Any, make_model: Any, tmp_path: Path
) -> None:
    class Stop(L.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 13:
                raise RuntimeError("stop")

    def train(out: str, stops: bool = False, ckpt_path: str | None = None) -> None:
        from lightning.pytorch.callbacks import ModelCheckpoint

        callback = AssayCallback({"t": assay.Target([collate(rows[40:])], loss)}, tmp_path / out, ids="doc")
        saves = ModelCheckpoint(tmp_path / f"{out}-saved", "{epoch}", every_n_epochs=1, save_top_k=-1)
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[callback, saves, *([Stop()] if stops else [])],
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(rows[:40], 4, collate_fn=collate)
        trainer.fit(Lit(make_model()), loader, ckpt_path=ckpt_path)

    train("whole")
    with pytest.raises(RuntimeError, match="stop"):
        train("run", stops=True)
    train("run", ckpt_path=str(tmp_path / "run-saved" / "epoch=0.ckpt"))
    found, whole = assay.open(tmp_path / "run"), assay.open(tmp_path / "whole")
    assert found.steps().equals(whole.steps())
    assert found.account().equals(whole.account())


def test_options_of_the_callbacks_own_method(fit: Any, rows: Any) -> None:
    callback = AssayCallback(assay.Target([collate(rows[40:])], loss), ids="doc", granularity="token")
    fit(callback, max_steps=2)
    name, value, _ = callback.ledger.values().row(0)
    assert callback.ledger.tokens(id=name)["value"].sum() == pytest.approx(value, rel=1e-3)
    with pytest.raises(InputError, match="brings one itself"):
        AssayCallback(callback._shapley.targets, methods=[callback._shapley])


def test_what_cannot_be_used_is_said_in_one_line(fit: Any, rows: Any) -> None:
    target = assay.Target([collate(rows[40:])], loss)
    with pytest.raises(InputError, match="no such key"):
        fit(AssayCallback(target, ids="name"))
    with pytest.raises(InputError, match="no such column"):
        AssayCallback(target, group="domain")
    with pytest.raises(InputError, match="not begun"):
        _ = AssayCallback(target).ledger
