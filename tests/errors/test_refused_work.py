"""Bad requests to what a run or an index holds, and to what trainers hand over: what is tried → how."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from errors.training import Training, one_line
from replay.common import Problem
from replay.common import loss_fn as replay_loss
from torch import Tensor, nn

import assay
from assay.acting.credit import credit
from assay.acting.select import select
from assay.curvature import Diagonal, Fisher
from assay.doctor import examine
from assay.evaluate.lds import linear_datamodeling_score
from assay.index.average import average_influence
from assay.integrations.collect import Collector
from assay.integrations.identity import content_id
from assay.integrations.lightning import AssayCallback as LightningCallback
from assay.integrations.transformers import AssayCallback
from assay.optimizers.select import model_of
from assay.replay.optimizers.select import adjoint_of
from assay.replay.smoothness import metasmoothness
from assay.rows.folder import Folder
from assay.rows.writer import RowWriter
from assay.serve.catalogue import Catalogue
from assay.store.ids import id_series
from assay.train.data import read_documents

MODEL = nn.Linear(3, 2)
BATCHES = [(["a", "b"], torch.randn(2, 3)), (["c"], torch.randn(1, 3))]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def index(**options: Any) -> assay.Index:
    return assay.Index.build(MODEL, BATCHES, loss, **{"projection": assay.Projection(rank=2), **options})


def ledger() -> assay.Ledger:
    training = Training()
    training.step()
    return training.close()


def rows(tmp_path: Path, **options: Any) -> RowWriter:
    return RowWriter(Folder(tmp_path / "rows"), 4, **options)


def documents(path: Path, text: str, **options: Any) -> None:
    from assay.train.config import Data

    path.write_text(text, encoding="utf-8")
    read_documents(Data(path=path, **options))


def not_utf8(path: Path) -> None:
    from assay.train.config import Data

    path.write_bytes(b'{"text": "caf\xe9"}\n')
    read_documents(Data(path=path))


def complex_weight() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    model_of(torch.optim.AdamW([weight])).split(weight, weight.detach())  # type: ignore[call-arg]


def broken_model(folder: Path) -> None:
    from assay.train.config import Model
    from assay.train.model import load_model

    for name in ("weights.pt", "tokenizer.json", "model.json", "config.json"):
        (folder / name).write_text("text", encoding="utf-8")
    load_model(Model(), folder)


class Loop:
    """Has what a Trainer has, and trains nothing."""

    train = training_step = get_train_dataloader = log = None

    def __init__(self) -> None:
        self.callback_handler = type("Handler", (), {"callbacks": []})()

    def add_callback(self, callback: object) -> None:
        self.callback_handler.callbacks.append(callback)


def attached_twice() -> None:
    callback = AssayCallback(out=None)
    callback.attach(Loop()).attach(Loop())


@lru_cache(maxsize=1)
def replayable() -> tuple[Problem, Any, nn.Module, Any]:
    problem = Problem("sgd", dropout=0.0)
    return (problem, *problem.recorded())


def adjoint(**options: Any) -> None:
    """Of the run above, with something else than what it was recorded with."""
    problem, run, _, _ = replayable()
    model = problem.model()
    given = {
        "batches_of_step": problem.batches,
        "loss_fn": replay_loss,
        "queries": problem.queries(),
        **options,
    }
    run.adjoint(model, given.pop("optimizer", problem.optimizer(model)), **given)


def explorer(ask: Callable[[Catalogue], object]) -> None:
    ask(Catalogue(ledger()))


# what is tried → how, in a folder that is empty
REFUSED: dict[str, Callable[[Path], object]] = {
    # an index
    "Index.build(check='always')": lambda f: index(check="always"),
    "Index.build(reduction='max')": lambda f: index(reduction="max"),
    "Index.build(dtype='fp8')": lambda f: index(dtype="fp8"),
    "Index.build(layers=[nn.Conv2d]) of a model without one": lambda f: index(layers=[nn.Conv2d]),
    "Index.build(layers=['haed'])": lambda f: index(layers=["haed"]),
    "Index.build with workers and no folder": lambda f: index(workers=assay.workers.Local(2)),
    "a batch without ids": lambda f: assay.Index.build(MODEL, [([], torch.ones(1, 3))], loss),
    "a build of no example": lambda f: assay.Index.build(MODEL, [], loss),
    "influence(curvature='newton')": lambda f: index().influence(MODEL, [BATCHES[0][1]], loss, curvature="newton"),  # type: ignore[arg-type]
    "ekfac without principal axes": lambda f: index().influence(MODEL, [BATCHES[0][1]], loss, curvature="ekfac"),
    "influence(by='token') of an index": lambda f: index().influence(MODEL, [BATCHES[0][1]], loss, by="token"),  # type: ignore[call-overload]
    "influence(normalize='max')": lambda f: index().influence(MODEL, [BATCHES[0][1]], loss, normalize="max"),  # type: ignore[arg-type]
    "influence on no query": lambda f: index().influence(MODEL, [], loss),
    "search(k=0)": lambda f: index().search(MODEL, [BATCHES[0][1]], loss, k=0),
    "an index of a smaller model": lambda f: index().influence(nn.Linear(3, 1), [BATCHES[0][1]], loss),
    "search over a model's index by several processes": lambda f: index().search(
        MODEL, [BATCHES[0][1]], loss, k=1, workers=assay.workers.Local(2)
    ),
    "a Fisher matrix of rank one without damping": lambda f: Fisher(torch.ones(2, 2), "fc").solve(
        torch.ones(1, 2), 0.0
    ),
    "a direction without curvature and without damping": lambda f: Diagonal(torch.tensor([1.0, 0.0]), "fc").solve(
        torch.ones(1, 2), 0.0
    ),
    # rows on the disk
    "rows of dtype fp8": lambda f: rows(f, dtype="fp8"),
    "three rows for two ids": lambda f: rows(f).append(pl.DataFrame({"id": [1, 2]}), torch.ones(3, 4)),
    "a gradient beyond the range of fp16": lambda f: rows(f, dtype="fp16").append(
        pl.DataFrame({"id": [1]}), torch.full((1, 4), 1e6)
    ),
    "a gradient that is not a number": lambda f: rows(f).append(
        pl.DataFrame({"id": [1]}), torch.full((1, 4), float("nan"))
    ),
    # a run's folder
    "an empty folder": lambda f: examine(f),
    "a folder that is not there": lambda f: assay.open(f / "gone"),
    "Run(resume=-1)": lambda f: Training(out=f / "run", resume=-1),
    "ids in a set": lambda f: id_series({1, 2}, None),
    "an id of a float": lambda f: id_series([1.5], None),
    "agreement with a matrix of another run": lambda f: ledger().agreement(torch.ones(1, 99)),
    "agreement with others of another shape": lambda f: ledger().agreement(
        torch.ones(1, 4), {"other": torch.ones(7, 7)}
    ),
    "a selection from data without the ids": lambda f: select(ledger(), drop="negative").write(
        f / "out", pl.DataFrame({"name": ["a"]}), id="url"
    ),
    "metasmoothness(h=0)": lambda f: metasmoothness(None, MODEL, None, None, loss, [], h=0.0),  # type: ignore[arg-type]
    "the adjoint of Adagrad": lambda f: adjoint_of(torch.optim.Adagrad(MODEL.parameters())),
    "a complex parameter": lambda f: complex_weight(),
    "agreement of a run with others of another shape": lambda f: replayable()[1].agreement(
        torch.ones(1, replayable()[1].rows.height), {"other": torch.ones(7, 7)}
    ),
    "an adjoint for no query": lambda f: adjoint(queries=[]),
    "an adjoint of a step that the run does not have": lambda f: adjoint(steps=[10**6]),
    "an adjoint of the last 0 steps": lambda f: adjoint(last=0),
    "an adjoint with clip='always'": lambda f: adjoint(clip="always"),
    "an adjoint with the optimizer of another model": lambda f: adjoint(
        optimizer=torch.optim.SGD(MODEL.parameters(), lr=0.1)
    ),
    "an adjoint of outputs='haed'": lambda f: adjoint(curvature="ggn", outputs="haed"),
    "an adjoint whose loss does not use the model": lambda f: adjoint(
        loss_fn=lambda model, batch: torch.zeros((), dtype=torch.float64, requires_grad=True)
    ),
    "an adjoint from micro-batches that are missing": lambda f: adjoint(batches_of_step=lambda step: []),
    "an adjoint from batches that are no pairs": lambda f: adjoint(batches_of_step=lambda step: torch.ones(2)),
    "credit to no target": lambda f: credit(ledger(), "domain", target=[]),
    "a selection written as CSV": lambda f: select(ledger(), drop="negative").write(
        f / "out", pl.DataFrame({"id": ledger().values()["id"]}), id="id", format="csv"  # type: ignore[arg-type]
    ),
    "a selection written below a file": lambda f: (
        (f / "file").write_text("x"),
        select(ledger(), drop="negative").write(f / "file" / "out", pl.DataFrame({"id": ledger().values()["id"]})),
    ),
    "an index of no parameter": lambda f: index(exclude=["*"]),
    "an average of checkpoints with no weight": lambda f: average_influence(
        [(index(), MODEL)], [BATCHES[0][1]], loss, weights=[0.0]
    ),
    "an average of one checkpoint with two weights": lambda f: average_influence(
        [(index(), MODEL)], [BATCHES[0][1]], loss, weights=[1.0, 1.0]
    ),
    "an index of another checkpoint in the same folder": lambda f: (
        index(out=f / "index"),
        assay.Index.build(nn.Linear(3, 2), BATCHES, loss, projection=assay.Projection(rank=2), out=f / "index"),
    ),
    "a document that the explorer does not have": lambda f: explorer(lambda c: c.document("no such")),
    "a target that the explorer does not have": lambda f: explorer(lambda c: c.page("other")),
    "a column that the explorer cannot filter by": lambda f: explorer(lambda c: c.groups("domain")),
    "a model folder that holds text": lambda f: broken_model(f),
    # trainers
    "a list in place of a Trainer": lambda f: AssayCallback(out=None).attach([]),
    "a callback attached twice": lambda f: attached_twice(),
    "a callback's ledger before training": lambda f: AssayCallback(out=None).ledger,
    "a group that is no column": lambda f: AssayCallback(out=None, group="domain"),
    "a Lightning callback's ledger before training": lambda f: (
        LightningCallback({"t": assay.Target([1], loss)}).ledger
    ),
    "a Lightning callback grouped by a column that the metadata lacks": lambda f: LightningCallback(
        {"t": assay.Target([1], loss)}, group="domain"
    ),
    "examples that are lists": lambda f: Collector(dict)([[1, 2]]),  # type: ignore[arg-type]
    "an id column that the data lack": lambda f: Collector(dict, id="url")([{"text": "a"}]),  # type: ignore[arg-type]
    "an id that is a float": lambda f: Collector(dict, id="url")([{"url": 1.5}]),  # type: ignore[arg-type]
    "an example of an object": lambda f: content_id({"image": object()}),
    # texts
    "a column of numbers as the text": lambda f: documents(f / "a.jsonl", '{"text": 1}\n'),
    "texts that are all empty": lambda f: documents(f / "a.jsonl", '{"text": ""}\n'),
    "a line that is no object": lambda f: documents(f / "a.jsonl", "[1]\n"),
    "a line that is no JSON": lambda f: documents(f / "a.jsonl", "{text}\n"),
    "text in Latin-1": lambda f: not_utf8(f / "a.jsonl"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tried", REFUSED)
def test_refused(tried: str, tmp_path: Path) -> None:
    with pytest.raises(assay.AssayError) as error:
        REFUSED[tried](tmp_path)
    one_line(error)


def test_scores_of_matrices_that_fit() -> None:
    """What is refused above is the exception."""
    ones = torch.ones(1, 2)
    assert linear_datamodeling_score(ones, torch.eye(2).repeat(2, 1), torch.arange(4.0)[None]).shape == (1,)
