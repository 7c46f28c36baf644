"""What a replay must notice, where it goes on after a kill, and what else the adjoint can be asked for."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from replay.common import ROWS, STEPS, Batch, Cubed, Problem, loss_fn
from torch import Tensor, nn
from torch.nn import functional as F

import assay
from assay.errors import InputError, StoreError, UnsupportedOptimizerError
from assay.replay import state

PROBLEM = Problem("adamw", clip=0.4, decay=0.1, schedule=True)


def values(problem: Problem, ledger: assay.Ledger, **options: Any) -> Tensor:
    model = problem.model()
    given = {"loss_fn": loss_fn, "queries": problem.queries(), "batches_of_step": problem.batches} | options
    return ledger.adjoint(model, problem.optimizer(model), **given)


def test_one_query_is_the_same_as_all_together_and_a_second_call_as_the_first() -> None:
    ledger, *_ = PROBLEM.recorded()
    together = values(PROBLEM, ledger)
    for i, query in enumerate(PROBLEM.queries()):
        alone = values(PROBLEM, ledger, queries=[query])
        assert torch.allclose(alone[0], together[i], rtol=1e-9, atol=1e-14)
    assert torch.equal(values(PROBLEM, ledger), together)


@pytest.mark.parametrize("snapshots", [1, 4, 100, "auto", "20 kB"])
def test_values_do_not_depend_on_the_snapshots(snapshots: Any, tmp_path: Path) -> None:
    ledger, *_ = PROBLEM.recorded(tmp_path / "run", snapshots=snapshots)
    expected = values(PROBLEM, PROBLEM.recorded(snapshots=3)[0])
    assert torch.allclose(values(PROBLEM, assay.open(tmp_path / "run")), expected, rtol=1e-9, atol=1e-14)
    assert ledger.rows.equals(assay.open(tmp_path / "run").rows)
    assert not any((tmp_path / "run" / "adjoint").iterdir())  # nothing of the work is left


def test_the_model_and_its_optimizer_are_as_they_were() -> None:
    ledger, model, optimizer = PROBLEM.recorded()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    state = torch.get_rng_state()
    ledger.adjoint(model, optimizer, PROBLEM.batches, loss_fn, PROBLEM.queries())
    assert all(torch.equal(x, before[0][name]) for name, x in model.state_dict().items())
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(x, now[i][k]) for i, s in before[1]["state"].items() for k, x in s.items())
    assert torch.equal(state, torch.get_rng_state())


def test_last_steps_and_chosen_steps() -> None:
    ledger, *_ = PROBLEM.recorded()
    whole = values(PROBLEM, ledger)
    some = values(PROBLEM, ledger, steps=[2, 5])
    at = [step * ROWS + row for step in (2, 5) for row in range(ROWS)]
    assert torch.allclose(some[:, at], whole[:, at], rtol=1e-9)
    assert int((~some.isnan()).sum()) == 3 * len(at)
    end = values(PROBLEM, ledger, last=2)
    assert torch.allclose(end[:, -2 * ROWS :], whole[:, -2 * ROWS :], rtol=1e-9)
    assert end[:, : -2 * ROWS].isnan().all()
    with pytest.raises(InputError, match=f"no step {STEPS}"):
        values(PROBLEM, ledger, steps=[STEPS])


def test_targets_and_another_loss_for_queries() -> None:
    ledger, *_ = PROBLEM.recorded()
    queries = PROBLEM.queries()

    def margin(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).logsumexp(1).sum()

    found = values(PROBLEM, ledger, queries=queries, query_loss=margin)
    named = {str(i): assay.Target([q], margin) for i, q in enumerate(queries)}
    assert torch.allclose(values(PROBLEM, ledger, queries=named), found, rtol=1e-12)
    assert not torch.allclose(values(PROBLEM, ledger), found, rtol=1e-2)


def test_gauss_newton_is_the_hessian_where_the_network_is_linear() -> None:
    ledger, model, optimizer, batches = linear()
    whole = ledger.adjoint(model, optimizer, batches, loss_fn, [batches(0)[0][1]])
    ggn = ledger.adjoint(model, optimizer, batches, loss_fn, [batches(0)[0][1]], curvature="ggn")
    assert torch.allclose(whole, ggn, rtol=1e-9, atol=1e-15)
    by_name = ledger.adjoint(
        model, optimizer, batches, loss_fn, [batches(0)[0][1]] * 2, curvature="ggn", outputs="1"
    )
    assert torch.allclose(whole, by_name[1:], rtol=1e-9, atol=1e-15)


def linear() -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    data = [(torch.randn(3, 2, 2).double(), torch.randint(3, (3,))) for _ in range(4)]

    def batches(step: int) -> Any:
        return [(["a", "b", "c"], data[step])]

    with assay.Run(model, optimizer, snapshots=2) as run:
        for step in range(4):
            for ids, batch in batches(step):
                with run.step(ids):
                    loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return run.ledger, model, optimizer, batches


class Convolution(nn.Module):
    """Its rule differentiates forward, so that the short way to H λ is not open to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).flatten(1))  # type: ignore[no-any-return]


class Squared(nn.Module):
    """Weights made of weights: what the capture makes of such a direction has no derivative of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(5, 16)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x.flatten(1), self.w * self.w / 4)) @ torch.exp(self.head).t()


def exact_and_true(model: nn.Module, queries: int) -> tuple[Tensor, Tensor]:
    """The adjoint's values of the first step's samples, and finite differences of training."""
    start = copy.deepcopy(model)
    data = [(torch.randn(2, 1, 4, 4).double(), torch.randint(3, (2,))) for _ in range(3)]

    def train(weights: list[float]) -> Tensor:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for step, (x, y) in enumerate(data):
            factors = torch.tensor(weights if step == 0 else [1.0, 1.0], dtype=torch.float64)
            (factors * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss_fn(model, data[1]).detach()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with assay.Run(model, optimizer, snapshots=1) as run:
        for step, batch in enumerate(data):
            with run.step([2 * step, 2 * step + 1]):
                loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = run.ledger.adjoint(
        model, optimizer, lambda t: [([2 * t, 2 * t + 1], data[t])], loss_fn, [data[1]] * queries
    )
    h = 1e-5
    pairs = [([1 - h, 1.0], [1 + h, 1.0]), ([1.0, 1 - h], [1.0, 1 + h])]
    truth = torch.stack([(train(low) - train(high)) / (2 * h) for low, high in pairs])
    return found[-1, :2], truth


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("make", [Convolution, Squared])
def test_operations_without_a_rule_of_their_own(make: Any, queries: int) -> None:
    found, truth = exact_and_true(make().double(), queries)
    assert (found - truth).abs().max() <= 1e-6 * truth.abs().max()


def test_a_wrong_second_derivative_is_noticed_and_done_without() -> None:
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3))).double()
    with pytest.warns(assay.AssayWarning, match="second derivative is off"):
        found, truth = exact_and_true(model, 1)
    assert (found - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_what_has_no_second_derivative_is_differenced() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), Final()).double()
    with pytest.warns(assay.AssayWarning, match="cannot be differentiated twice"):
        found, truth = exact_and_true(model, 2)
    assert (found - truth).abs().max() <= 1e-4 * truth.abs().max()


class Final(nn.Module):
    """An operation whose derivative is declared final."""

    def forward(self, x: Tensor) -> Tensor:
        return Cubed.apply(x)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.3}, "at step 8 .* draws random numbers"),
        ({"clip": 0.2}, "another run"),
    ],
)
def test_another_run_is_noticed(change: dict[str, Any], message: str) -> None:
    ledger, *_ = PROBLEM.recorded(snapshots=4)
    other = dataclasses.replace(PROBLEM, **change)
    if "clip" in change:
        with pytest.raises(InputError, match=r"not the run: at step \d+ the gradient's norm"):
            values(other, ledger, clip=0.2)
        return
    with pytest.raises(InputError, match=message):
        values(other, ledger)


def test_other_data_are_named() -> None:
    ledger, *_ = PROBLEM.recorded(snapshots=4)

    def shuffled(step: int) -> Any:
        ((ids, batch),) = PROBLEM.batches(step)
        return [(ids[::-1] if step == 6 else ids, batch)]

    with pytest.raises(InputError, match=r"step 6, micro-batch 0: the run saw 600 in row 0, .* gives 602"):
        values(PROBLEM, ledger, batches_of_step=shuffled)

    def augmented(step: int) -> Any:
        ((ids, (x, y)),) = PROBLEM.batches(step)
        return [(ids, ((x + 1) % 6 if step == 8 else x, y))]

    plain = dataclasses.replace(PROBLEM, dropout=0.0)
    with pytest.raises(InputError, match=r"at step 8 .* the data behind the ids, loss_fn"):
        values(plain, plain.recorded(snapshots=4)[0], batches_of_step=augmented)
    with pytest.raises(InputError, match=r"at step 8 .* ratio is"):
        values(plain, plain.recorded(snapshots=4)[0], loss_fn=lambda m, b: 3 * loss_fn(m, b), clip=None)
    with pytest.raises(InputError, match=r"list of \(ids, batch\)"):
        values(PROBLEM, ledger, batches_of_step=lambda step: PROBLEM.batches(step)[0][1])


def test_other_models_optimizers_and_runs_are_refused(tmp_path: Path) -> None:
    ledger, model, _ = PROBLEM.recorded()
    call = (PROBLEM.batches, loss_fn, PROBLEM.queries())
    with pytest.raises(UnsupportedOptimizerError, match="RMSprop"):
        ledger.adjoint(model, torch.optim.RMSprop(model.parameters()), *call)
    with pytest.raises(InputError, match="parameter groups"):
        ledger.adjoint(model, torch.optim.AdamW(model.parameters()), *call)
    other = nn.Linear(2, 2).double()
    with pytest.raises(InputError, match="not the run's"):
        ledger.adjoint(other, torch.optim.AdamW(other.parameters()), *call)
    with pytest.raises(InputError, match="no query"):
        values(PROBLEM, ledger, queries=[])
    with pytest.raises(InputError, match=r"'fisher'\) is not known"):
        values(PROBLEM, ledger, curvature="fisher")
    plain = nn.Linear(2, 1)
    target = assay.Target([torch.ones(1, 2)], lambda m, x: m(x).sum())
    method = assay.InRunShapley(target)
    with assay.Run(plain, torch.optim.SGD(plain.parameters(), lr=0.1), methods=[method]) as run:
        pass
    with pytest.raises(StoreError, match="no snapshots"):
        run.ledger.adjoint(plain, torch.optim.SGD(plain.parameters(), lr=0.1), *call)


def test_a_step_outside_of_the_run_is_refused() -> None:
    model = PROBLEM.model()
    optimizer = PROBLEM.optimizer(model)
    with assay.Run(model, optimizer, snapshots=2) as run:
        for step in range(3):
            ((ids, batch),) = PROBLEM.batches(step)
            if step != 1:
                with run.step(ids):
                    loss_fn(model, batch).backward()
            else:
                loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(InputError, match="before step 1 the optimizer took a step outside"):
        values(PROBLEM, run.ledger)


def test_a_damaged_or_missing_snapshot_is_named(tmp_path: Path) -> None:
    PROBLEM.recorded(tmp_path / "run", snapshots=4)
    path = sorted((tmp_path / "run" / "snapshots").glob("state-000000004-*.pt"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"state-000000004.*checksum"):
        values(PROBLEM, assay.open(tmp_path / "run"))
    PROBLEM.recorded(tmp_path / "other", snapshots=4)
    folder = tmp_path / "other" / "snapshots"
    next(folder.glob("log-000000000-*")).unlink()
    with pytest.warns(assay.AssayWarning, match="from 4 on"):
        assert len(assay.open(tmp_path / "other").rows) == (STEPS - 4) * ROWS
    next(folder.glob("log-000000008-*")).unlink()
    with pytest.raises(StoreError, match="lacks step 8"):
        values(PROBLEM, assay.open(tmp_path / "other"))


def test_an_adjoint_that_was_killed_goes_on(tmp_path: Path) -> None:
    ledger, *_ = PROBLEM.recorded(tmp_path / "run", snapshots=2)
    expected = values(PROBLEM, PROBLEM.recorded()[0])
    killed = subprocess.run(
        [sys.executable, "-m", "replay.killed", str(tmp_path / "run")],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    done: list[int] = []
    found = values(PROBLEM, ledger, progress=lambda n, of: done.append(n))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)
    assert done == [7, 9]  # the steps before were done by the one that was killed


def test_progress_that_is_not_due_is_written_with_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("assay.replay.state.time.monotonic", lambda: clock[0])
    files = state.ProgressFiles(tmp_path, {}, torch.zeros(1))
    assert files.files is not None
    write = files.files.write

    def slow(name: str, number: int, content: Any) -> int:
        clock[0] += 1
        return write(name, number, content)

    monkeypatch.setattr(files.files, "write", slow)
    progress = state.Progress(9, {"weights": torch.zeros(1, 2)}, {})
    written = []
    for step in range(8, 0, -1):
        progress.step, progress.values[step] = step, torch.full((1, 1), float(step))
        files.write(progress, [step])
        found = files.read(torch.device("cpu"))
        assert found is not None
        assert sorted(found.values) == list(
            range(found.step, 9)
        )  # with those of the segments that were not due
        written.append(found.step)
        clock[0] += 30  # two seconds of writing are due after a hundred
    assert written == [8, 8, 8, 8, 4, 4, 4, 4]


def test_an_adjoint_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    ledger, *_ = PROBLEM.recorded(tmp_path / "run", snapshots=2)
    done = subprocess.run(
        [sys.executable, "-m", "replay.killed_often", str(tmp_path / "run"), str(tmp_path / "values"), "0"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) >= 2, done.stderr
    found = torch.load(tmp_path / "values", weights_only=True)
    assert not any((tmp_path / "run" / "adjoint").iterdir())
    assert torch.equal(found, values(PROBLEM, ledger))


def test_a_run_that_was_killed_is_replayed_as_far_as_it_was_written(tmp_path: Path) -> None:
    PROBLEM.recorded(tmp_path / "run", snapshots=2)
    for path in (tmp_path / "run" / "snapshots").iterdir():
        if "state-000000009" in path.name or "log-000000008" in path.name:
            path.unlink()
    ledger = assay.open(tmp_path / "run")
    assert len(ledger.rows) == 8 * ROWS
    assert values(PROBLEM, ledger).shape == (3, 8 * ROWS)


def test_agreement_puts_the_exact_first() -> None:
    ledger, *_ = PROBLEM.recorded()
    exact = values(PROBLEM, ledger)
    table = ledger.agreement(exact, {"noise": torch.randn(exact.shape), "half": 0.5 * exact})
    assert table["method"][0] == "half"
    assert table.filter(method="half")["by_step"].to_list() == pytest.approx([1.0] * 3)
    assert (table.filter(method="noise")["by_id"].abs() < 0.7).all()
    with pytest.raises(InputError, match="27 rows"):
        ledger.agreement(exact[:, :5])
    by_id = exact[:, :]  # every id was seen once
    assert ledger.agreement(exact, {"ids": by_id})["by_id"].to_list() == pytest.approx([1.0] * 3)


def test_a_run_that_was_killed_and_resumed_is_replayed(tmp_path: Path) -> None:
    expected = values(PROBLEM, PROBLEM.recorded()[0])
    model = PROBLEM.model()
    optimizer = PROBLEM.optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, PROBLEM.rate)
    torch.manual_seed(3)
    kept: dict[str, Any] = {}

    def go(run: assay.Run, steps: range) -> None:
        for step in steps:
            if step == 5:
                kept.update(
                    copy.deepcopy(
                        {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                         "scheduler": scheduler.state_dict(), "run": run.state_dict()}
                    ),
                    random=torch.get_rng_state(),
                )  # fmt: skip
            ((ids, batch),) = PROBLEM.batches(step)
            with run.step(ids):
                loss_fn(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    methods = [assay.InRunShapley(assay.Target(PROBLEM.queries()[:1], loss_fn))]
    with assay.Run(model, optimizer, tmp_path / "run", methods, snapshots=2) as run:
        go(run, range(7))
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    scheduler.load_state_dict(kept["scheduler"])
    torch.set_rng_state(kept["random"])
    with assay.Run(model, optimizer, tmp_path / "run", methods, snapshots=2, resume=kept["run"]) as run:
        go(run, range(5, STEPS))
    found = values(PROBLEM, assay.open(tmp_path / "run"))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)
