"""The Trainer with the callback against a plain loop over the same batches, and everything around it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import assay
from assay.errors import InputError
from assay.integrations.identity import content_id
from integrations.texts import pad

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from assay.integrations.collect import Collector  # noqa: E402
from assay.integrations.transformers import AssayCallback  # noqa: E402
from integrations import two_processes  # noqa: E402


@pytest.fixture
def make_trainer(data: Any, held_out: Any, make_model: Any, tmp_path: Path) -> Any:
    """A Trainer with clipping, decay and a schedule; keywords replace its arguments."""

    def make(train_dataset: Any = None, model: Any = None, collate: Any = pad, **arguments: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "trainer"),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "warmup_steps": 2,
            "adam_epsilon": 1e-5,
            "logging_steps": 2,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **arguments,
        }
        return transformers.Trainer(
            make_model() if model is None else model,
            transformers.TrainingArguments(**settings),
            data_collator=collate,
            train_dataset=data if train_dataset is None else train_dataset,
            eval_dataset=held_out,
        )

    return make


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the trainer's own libraries
        warnings.simplefilter("error", assay.AssayWarning)
        warnings.filterwarnings("ignore", ".*explain", assay.AssayWarning)
        yield


def replay(
    make_model: Any, rows: list[dict[str, Any]], held_out: Any, steps: list[list[list[str]]], total: int
) -> Any:
    """The same training as a plain loop with `run.step`: documents of each micro-batch of each step, by name."""
    by_name = {row["doc"]: {"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows}
    model = make_model().train()
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2]
    others = [p for name, p in model.named_parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.999), eps=1e-5,
    )  # fmt: skip
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, total)
    batch = pad([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in held_out])
    target = assay.Target([batch], lambda model, batch: model(**batch).loss)
    run = assay.Run(model, optimizer, methods=[assay.InRunShapley({"eval": target})])
    for micros in steps:
        batches = [pad([by_name[name] for name in names]) for names in micros]
        tokens = sum(int((b["labels"][:, 1:] >= 0).sum()) for b in batches)
        for names, batch in zip(micros, batches, strict=True):
            with run.step(names):
                model(**batch, num_items_in_batch=torch.tensor(tokens)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    run.close()
    return run.ledger, model


def grouped(ledger: Any, size: int) -> list[list[list[str]]]:
    """Names of each micro-batch of each step, as they were recorded."""
    found = ledger.steps()
    return [
        [part["id"].to_list() for part in step.iter_slices(size)]
        for step in found.partition_by("step", maintain_order=True)
    ]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["dataset", "list", "stream"])
def test_values_are_those_of_a_plain_loop(
    make_trainer: Any, make_model: Any, rows: Any, data: Any, held_out: Any, accumulate: int, kind: str
) -> None:
    # of the stream a multiple of both accumulations: the Trainer carries a remainder's gradient into the next epoch
    stream = data.select(range(36)).to_iterable_dataset()
    train = {"dataset": data, "list": rows[:40], "stream": stream}[kind]
    length = {"max_steps": 8} if kind == "stream" else {}
    trainer = make_trainer(train, gradient_accumulation_steps=accumulate, **length)
    callback = AssayCallback(id="doc", columns=["domain"]).attach(trainer)
    trainer.train()
    ledger = callback.ledger
    total = trainer.state.max_steps
    assert ledger.account()["step"].to_list() == list(range(total))
    plain, model = replay(make_model, rows, held_out, grouped(ledger, 4), total)
    found, expected = ledger.steps(), plain.steps()
    assert found.select("step", "id").equals(expected.select("step", "id"))
    scale = expected["value"].abs().max()
    np.testing.assert_allclose(found["value"], expected["value"], rtol=2e-3, atol=1e-4 * scale)
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if kind != "stream":
        assert ledger.values()["steps"].unique().to_list() == [2]  # each document, once per epoch
        assert dict(ledger.metadata().select("id", "domain").iter_rows()) == {
            row["doc"]: row["domain"] for row in rows[:40]
        }


def test_shuffled_documents_keep_their_names(make_trainer: Any, rows: Any) -> None:
    """The loader's order has nothing to do with the names: each value belongs to the text of that name."""
    trainer = make_trainer(num_train_epochs=1)
    named = AssayCallback(id="doc").attach(trainer)
    trainer.train()
    again = make_trainer(num_train_epochs=1)
    hashed = AssayCallback().attach(again)
    again.train()
    content = {content_id({k: row[k] for k in ("input_ids", "labels")}): row["doc"] for row in rows}
    found = {content[id_]: value for id_, value, _ in hashed.ledger.values().iter_rows()}
    assert found == pytest.approx({id_: value for id_, value, _ in named.ledger.values().iter_rows()})
    order = named.ledger.steps()["id"].to_list()
    assert order != [row["doc"] for row in rows[:40]]
    assert sorted(order) == sorted(row["doc"] for row in rows[:40])


def test_workers_hand_on_names(make_trainer: Any, rows: Any) -> None:
    trainer = make_trainer(num_train_epochs=1, dataloader_num_workers=2, max_steps=3)
    callback = AssayCallback(id="doc").attach(trainer)
    trainer.train()
    assert set(callback.ledger.values()["id"]) <= {row["doc"] for row in rows[:40]}
    assert callback.ledger.values().height == 12


def test_all_columns_kept(make_trainer: Any, rows: Any) -> None:
    """With remove_unused_columns=False the collator gets what it would get without assay."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        assert {"doc", "domain", "input_ids"} <= set(examples[0])
        return pad([{k: e[k] for k in ("input_ids", "labels")} for e in examples])

    trainer = make_trainer(collate=collate, remove_unused_columns=False, max_steps=2)
    callback = AssayCallback(id="doc", columns=["domain"]).attach(trainer)
    trainer.train()
    assert set(callback.ledger.values()["id"]) <= {row["doc"] for row in rows[:40]}
    assert set(callback.ledger.metadata()["domain"]) <= {row["domain"] for row in rows}


class Settings:
    """A collator with a setting of its own; its trainer's data need not have the model's columns."""

    column = "tokens"

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        return pad([dict.fromkeys(("input_ids", "labels"), example[self.column]) for example in examples])


def test_a_trainer_that_reads_its_collator_and_keeps_the_columns(
    make_trainer: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the one of sentence-transformers, whose collator makes the model's inputs from columns of text."""

    def loader(self: Any) -> Any:
        assert self.data_collator.column == "tokens"
        assert not hasattr(self.data_collator, "row")
        return torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=self.data_collator)

    monkeypatch.setattr(transformers.Trainer, "get_train_dataloader", loader)
    data = [{"doc": row["doc"], "tokens": row["input_ids"]} for row in rows[:8]]
    trainer = make_trainer(data, collate=Settings(), num_train_epochs=1)
    callback = AssayCallback(
        assay.Target([pad([{k: row[k] for k in ("input_ids", "labels")} for row in rows[40:]])], model_loss),
        id="doc",
    ).attach(trainer)
    trainer.train()
    assert set(callback.ledger.values()["id"]) == {row["doc"] for row in data}


def model_loss(model: Any, batch: Any) -> Any:
    return model(**batch).loss


def test_a_collator_is_copied_and_sent_to_workers() -> None:
    collector = Collector(Settings(), "doc")
    for copied in (copy.copy(collector), copy.deepcopy(collector), pickle.loads(pickle.dumps(collector))):
        assert (copied.id, copied.column) == ("doc", "tokens")


def test_training_is_what_it_is_without(make_trainer: Any) -> None:
    trained = []
    for watched in (False, True):
        trainer = make_trainer(gradient_accumulation_steps=2)
        if watched:
            AssayCallback(id="doc", strict=True).attach(trainer)
        trainer.train()
        trained.append((trainer.model, trainer.state.log_history))
    (plain, history), (watched, logged) = trained
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row.get("loss") for row in history] == [row.get("loss") for row in logged]


def test_evaluation_in_between_changes_nothing(make_trainer: Any) -> None:
    values = []
    for arguments in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trainer = make_trainer(**arguments)
        callback = AssayCallback(id="doc").attach(trainer)
        trainer.train()
        values.append(callback.ledger)
    assert values[0].steps().equals(values[1].steps())
    assert values[0].account().equals(values[1].account())
    assert any("eval_loss" in row for row in trainer.state.log_history)


def test_numbers_reach_the_loggers(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(report_to=["tensorboard"])
    callback = AssayCallback(out=tmp_path / "run", id="doc", columns=["domain"], group="domain").attach(
        trainer
    )
    trainer.train()
    ledger = assay.open(tmp_path / "run")
    last = next(row for row in reversed(trainer.state.log_history) if "loss" in row)
    for domain, value, *_ in ledger.by("domain").iter_rows():
        assert last[f"assay/value/eval/{domain}"] == pytest.approx(value, abs=0.1)
    assert 0 < last["assay/share_of_time"] < 1
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert "train/assay/explained/eval" in events.Tags()["scalars"]
    assert callback.ledger.table("curve").height == 10


def test_the_running_sums_end_at_the_ledgers(make_trainer: Any) -> None:
    from assay.integrations.live import LiveValues

    trainer = make_trainer(logging_steps=1, max_steps=7)
    callback = AssayCallback(id="doc", columns=["domain"], group="domain").attach(trainer)
    trainer.train()
    assert callback.run is not None
    groups = dict(callback.ledger.metadata().select("id", "domain").iter_rows())
    whole = LiveValues(callback.run).read(groups)
    for domain, value, *_ in callback.ledger.by("domain").iter_rows():
        assert whole[f"assay/value/eval/{domain}"] == pytest.approx(value)


def test_an_error_leaves_a_whole_ledger_and_the_trainer_as_it_was(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(logging_steps=1)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    AssayCallback(out=tmp_path / "run", id="doc", columns=["domain"]).attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    ledger = assay.open(tmp_path / "run")
    assert ledger.account()["step"].to_list() == [0, 1, 2]
    assert ledger.account()["status"].unique().to_list() == ["ok"]
    assert ledger.metadata().height == 12
    for name in ("train", "training_step", "log", "get_train_dataloader", "_load_best_model"):
        assert name not in vars(trainer)
    assert not any(isinstance(c, AssayCallback) for c in trainer.callback_handler.callbacks)


def test_metadata_are_there_while_the_training_goes_on(make_trainer: Any) -> None:
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(
                (callback.ledger.metadata().height, callback.ledger.by("domain")["domain"].null_count())
            )

    trainer = make_trainer(max_steps=3)
    trainer.add_callback(Look())
    callback = AssayCallback(id="doc", columns=["domain"]).attach(trainer)
    trainer.train()
    assert seen == [(4, 0), (8, 0), (12, 0)]


@pytest.mark.parametrize("on_error", ["raise", "detach"])
def test_metadata_that_cannot_be_kept_cost_no_values(
    make_trainer: Any, rows: Any, tmp_path: Path, on_error: Any
) -> None:
    """Columns that do not fit are told of by name, and the run is whole all the same."""
    odd = [{**row, "odd": n if n % 2 else [n]} for n, row in enumerate(rows[:40])]
    trainer = make_trainer(odd, max_steps=5)
    AssayCallback(out=tmp_path / "run", id="doc", columns=["odd"], on_error=on_error).attach(trainer)
    if on_error == "raise":
        with pytest.raises(InputError, match=r"column 'odd' .* \(int, list\)"):
            trainer.train()
    else:
        with pytest.warns(assay.AssayWarning, match="attribution stopped in writing"):
            trainer.train()
    assert trainer.state.global_step == 5
    ledger = assay.open(tmp_path / "run")
    assert ledger.account()["status"].to_list() == ["ok"] * 5
    assert ledger.values().height == 20


class Stop(transformers.TrainerCallback):  # type: ignore[misc]
    """The process dies after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("accumulate", "stops"), [(1, (6, 11)), (3, (4,))])
def test_a_training_that_is_resumed_goes_on_in_the_same_folder(
    make_trainer: Any, tmp_path: Path, accumulate: int, stops: tuple[int, ...]
) -> None:
    """Broken off behind its last checkpoint, it ends with the ledger of one that was never broken off."""
    arguments = {
        "save_strategy": "steps", "save_steps": 4 if accumulate == 1 else 2,
        "gradient_accumulation_steps": accumulate,
    }  # fmt: skip

    def attached(out: str, **more: Any) -> Any:
        trainer = make_trainer(output_dir=str(tmp_path / f"{out}-trainer"), **arguments, **more)
        embedding = assay.DataValueEmbedding(assay.Projection(rank=2))
        options: Any = {"columns": ["domain"], "group": "domain", "methods": [embedding]}
        AssayCallback(out=tmp_path / out, id="doc", path="trapezoid", **options).attach(trainer)
        return trainer

    attached("whole").train()
    for n, stop in enumerate(stops):
        trainer = attached("run")
        trainer.add_callback(Stop(stop))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True if n else None)
    attached("run").train(resume_from_checkpoint=True)
    found, whole = assay.open(tmp_path / "run"), assay.open(tmp_path / "whole")
    assert found.steps().equals(whole.steps())
    assert found.account().equals(whole.account())
    assert found.metadata().sort("id").equals(whole.metadata().sort("id"))
    assert torch.equal(found.embeddings(segments=2).export(), whole.embeddings(segments=2).export())
    assert "resumed_from_step" in found.info


def test_a_folder_without_the_steps_before_the_checkpoint_says_so(make_trainer: Any, tmp_path: Path) -> None:
    """The callback joins when the training is resumed: the steps keep the trainer's numbers."""
    arguments = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1}
    make_trainer(**arguments).train()
    again = make_trainer(**arguments)
    AssayCallback(out=tmp_path / "run", id="doc").attach(again)
    with pytest.warns(
        assay.AssayWarning, match=r"goes on at step 4, but the last step that .*run holds is none"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))
    assert assay.open(tmp_path / "run").account()["step"].to_list() == list(range(4, 10))


def test_the_best_model_is_loaded_after_the_last_step_is_booked(make_trainer: Any) -> None:
    accounts = []
    for best in (False, True):
        trainer = make_trainer(
            num_train_epochs=1, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=best, metric_for_best_model="eval_loss", greater_is_better=True,
        )  # fmt: skip
        callback = AssayCallback(id="doc").attach(trainer)
        trainer.train()
        accounts.append(callback.ledger.account())
    assert accounts[0].equals(accounts[1])


@pytest.mark.parametrize("momentum", ["instant", "exact"])
def test_a_training_that_begins_anew_with_smaller_batches(
    make_trainer: Any, tmp_path: Path, momentum: str
) -> None:
    """After an out-of-memory the Trainer starts its loop again; the ledger is that of the attempt that went through."""

    ledgers, weights = [], []
    for out in (None, tmp_path / "run", "without"):
        trainer = make_trainer(auto_find_batch_size=True, num_train_epochs=1, max_grad_norm=0.0)

        def starve(model: Any, args: Any, inputs: Any, trainer: Any = trainer) -> None:
            if model.training and trainer.state.global_step > 1 and len(inputs["input_ids"]) > 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        trainer.model.register_forward_pre_hook(starve, with_kwargs=True)
        callback = AssayCallback(
            out=None if out == "without" else out, id="doc", columns=["domain"], group="domain",
            momentum=momentum, strict=True, check="off", info={"mine": 1},
        )  # fmt: skip
        if out != "without":
            callback.attach(trainer)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
        if out != "without":
            ledgers.append(callback.ledger)
    memory, folder = ledgers
    assert memory.steps().equals(folder.steps())
    assert memory.account().equals(folder.account())
    assert memory.metadata().sort("id").equals(folder.metadata().sort("id"))
    assert folder.account()["step"].to_list() == list(range(14))  # 40 documents, three at a time
    assert folder.values().height == folder.metadata().height == 40
    assert folder.info["mine"] == 1
    for kept, *others in zip(*weights, strict=True):
        assert all(torch.equal(kept, other) for other in others)


@pytest.mark.parametrize("later", [False, True])
def test_weights_put_in_at_the_end_of_training_change_nothing(make_trainer: Any, later: bool) -> None:
    """The last step is settled before the averaged weights are there, wherever their callback stands in the list."""

    class Average(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(0.5)

    ledgers = []
    for others in ([], [Average()]):
        trainer = make_trainer(max_steps=3)
        callback = AssayCallback(id="doc", path="trapezoid")
        if later:
            callback.attach(trainer)
        for other in others:
            trainer.add_callback(other)
        if not later:
            callback.attach(trainer)
        trainer.train()
        assert "on_train_end" not in vars(trainer.callback_handler)
        ledgers.append(callback.ledger)
    assert ledgers[0].steps().equals(ledgers[1].steps())
    assert ledgers[0].account().equals(ledgers[1].account())


def test_targets_of_ones_own(make_trainer: Any, held_out: Any) -> None:
    own = assay.Target(
        [pad([{k: held_out[0][k] for k in ("input_ids", "labels")}])], lambda m, b: m(**b).loss
    )
    trainer = make_trainer(max_steps=2)
    callback = AssayCallback({"one": own, "all": held_out, "three": held_out}, id="doc", rows=3).attach(
        trainer
    )
    trainer.train()
    assert callback.ledger.targets == ["one", "all", "three"]
    assert callback.ledger.values("all").equals(callback.ledger.values("three"))
    assert not callback.ledger.values("all").equals(callback.ledger.values("one"))


def test_options_of_the_callbacks_own_method(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=2)
    callback = AssayCallback(id="doc", granularity="token", target_gradient="bfloat16").attach(trainer)
    trainer.train()
    name, value, _ = callback.ledger.values().row(0)
    assert callback.ledger.tokens(id=name)["value"].sum() == pytest.approx(value, rel=1e-3)


def test_what_cannot_be_used_is_said_in_one_line(make_trainer: Any, make_model: Any, data: Any) -> None:
    with pytest.raises(InputError, match="no Trainer"):
        AssayCallback().attach(object())
    with pytest.raises(InputError, match="columns="):
        AssayCallback(group="domain")
    own = assay.InRunShapley({"t": assay.Target([None], model_loss)})
    with pytest.raises(InputError, match="brings one itself"):
        AssayCallback(methods=[own])
    with pytest.raises(InputError, match="not begun"):
        _ = AssayCallback().ledger
    trainer = make_trainer()
    trainer.add_callback(AssayCallback())
    with pytest.raises(InputError, match="attach"):
        trainer.train()
    trainer = make_trainer()
    AssayCallback(id="nowhere").attach(trainer)
    with pytest.raises(InputError, match="no column 'nowhere'"):
        trainer.train()
    trainer = make_trainer()
    trainer.eval_dataset = None
    AssayCallback(id="doc").attach(trainer)
    with pytest.raises(InputError, match="nothing to value"):
        trainer.train()


def test_several_devices_are_refused(make_trainer: Any) -> None:
    trainer = make_trainer()
    callback = AssayCallback(id="doc").attach(trainer)
    trainer.args._n_gpu = 2
    with pytest.raises(InputError, match="one device per process, and this one has 2"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_two_processes_give_the_values_of_one(rows: Any, tmp_path: Path) -> None:
    """Started by torchrun; the Trainer deals the documents out, and the training with `no_sync` is also resumed."""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, two_processes.__file__, str(tmp_path)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for accumulate in two_processes.ACCUMULATE:
        two_processes.train(tmp_path, accumulate, 4)
        found, one = (assay.open(tmp_path / f"{accumulate}-{batch}") for batch in (2, 4))
        a, b = (ledger.steps().sort("step", "id") for ledger in (found, one))
        assert a.select("step", "id").equals(b.select("step", "id"))
        np.testing.assert_allclose(a["value"], b["value"], rtol=0, atol=1e-5 * b["value"].abs().max())
        for column in ("predicted", "actual"):
            x, y = (ledger.account()[column].to_numpy() for ledger in (found, one))
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
        assert found.metadata().sort("id").equals(one.metadata().sort("id"))
        assert found.info["processes"] == {"kind": "ddp", "size": 2}


def test_content_ids() -> None:
    a = {"input_ids": [1, 2], "labels": np.array([1, 2], dtype=np.int32), "text": "x"}
    b = {"labels": torch.tensor([1, 2]), "text": "x", "input_ids": (1, 2)}
    assert content_id(a) == content_id(b)
    different = [
        {**b, "text": "y"},
        {**b, "labels": [1]},
        {**b, "labels": None},
        {"input_ids": [1, 2]},
        [[1], [2]],
        [[1, 2]],
    ]
    assert len({content_id(x) for x in [a, *different]}) == 7
    assert content_id([1.5, 2.5]) == content_id(torch.tensor([1.5, 2.5], dtype=torch.bfloat16))
    assert content_id(["ab", "c"]) != content_id(["a", "bc"])
    assert content_id([[1, 2], [3]]) != content_id([[1], [2, 3]])
    with pytest.raises(InputError, match="no content"):
        content_id({"image": object()})
