"""Bad input gets one line that says what is wrong and what to do, and nothing recorded before it is lost."""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import CASES, plan
from reference.models import WithCube
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import assay
from assay.store.recording import Recording

CASE = CASES["mlp"]
LOSS = CASE.losses["sample_mean"]
Batch = dict[str, Tensor]


class Training:
    """An MLP in training with assay, one optimizer step per `step`."""

    def __init__(
        self,
        out: Path | None = None,
        target_loss: Callable[[nn.Module, Batch], Any] = LOSS,
        build: Callable[[nn.Module], Optimizer] = lambda m: AdamW(m.parameters(), lr=0.01),
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.model = CASE.model() if model is None else model
        self.optimizer = build(self.model)
        target = assay.Target([CASE.batch(3, seed=7)], target_loss)
        methods = [assay.InRunShapley(targets={"held_out": target})]
        self.run = assay.Run(self.model, self.optimizer, out=out, methods=methods, **options)
        self.data = plan(CASE, steps=30)
        self.taken = 0

    def step(self, loss: Callable[[nn.Module, Batch], Tensor] = LOSS, ids: Any = None) -> None:
        own, batch = self.data[self.taken][0]
        with self.run.step(own if ids is None else ids):
            loss(self.model, batch).backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1

    def close(self) -> assay.Ledger:
        self.run.close()
        return self.run.ledger


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert 20 < len(message) < 400
    return message


def is_whole(ledger: assay.Ledger, steps: int, samples: int = 4) -> None:
    """All of so many steps are there, each value a number, each account closed."""
    frame = ledger.steps("held_out")
    assert frame["step"].n_unique() == steps
    assert len(frame) == steps * samples
    assert frame["value"].is_finite().all()
    assert ledger.account("held_out")["status"].to_list() == ["ok"] * steps


# --- ids


@pytest.mark.parametrize("ids", [[1, 2, 3], [1, 2, 3, 4, 5], [], [9]], ids=str)
def test_ids_of_the_wrong_length(ids: list[Any]) -> None:
    """The error says how many ids came and how many samples; the weights and the values of before stand."""
    training = Training()
    training.step()
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(assay.InputError, match=r"\bids?\b") as error:
        training.step(ids=ids)
    message = one_line(error)
    assert not ids or (str(len(ids)) in message and "4" in message)
    assert all(map(torch.equal, before, training.model.parameters()))
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=2)


@pytest.mark.parametrize(
    "ids",
    [[1.5, 2.5, 3.5, 4.5], [None] * 4, [[1], [2], [3], [4]], [1, 2, "three", 4], 7, "abcd", [2**70] * 4],
)
def test_ids_that_are_no_ids(ids: Any) -> None:
    training = Training()
    training.step()
    with pytest.raises(assay.InputError, match=r"\bids?\b") as error:
        training.step(ids=ids)
    one_line(error)
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=2)


def test_kind_of_ids_changes() -> None:
    training = Training()
    training.step()
    with pytest.raises(assay.InputError, match=r"\bids?\b") as error:
        training.step(ids=["a", "b", "c", "d"])
    one_line(error)
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=2)


# --- the loop


def test_step_without_backward() -> None:
    """The second `run.step` says that the first had no backward pass; the loop can go on after it."""
    training = Training()
    training.step()
    ids, batch = training.data[1][0]
    with pytest.raises(assay.AssayError, match="backward") as error:  # noqa: PT012
        with training.run.step(ids):
            LOSS(training.model, batch)
        with training.run.step(ids):
            LOSS(training.model, batch)
    one_line(error)
    training.taken = 1
    training.step()
    is_whole(training.close(), steps=2)


def test_two_backward_passes_in_one_step() -> None:
    """Both are in the gradient, so both are in the values."""
    twice, doubled = Training(), Training()
    ids, batch = twice.data[0][0]
    with twice.run.step(ids):
        loss = LOSS(twice.model, batch)
        loss.backward(retain_graph=True)
        loss.backward()
    twice.update()
    with doubled.run.step(ids):
        (2 * LOSS(doubled.model, batch)).backward()
    doubled.update()
    a, b = (t.close().steps("held_out")["value"].to_list() for t in (twice, doubled))
    assert a == pytest.approx(b, rel=1e-9)


def test_nested_step() -> None:
    training = Training()
    ids, _ = training.data[0][0]
    with (
        pytest.raises(assay.AssayError, match="step") as error,
        training.run.step(ids),
        training.run.step(ids),
    ):
        pass
    one_line(error)
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=1)


def test_error_of_the_users_own_code_passes_through() -> None:
    """An exception inside `run.step` is the user's; the next micro-batch starts afresh."""
    training = Training()
    training.step()
    ids, batch = training.data[1][0]
    with pytest.raises(RuntimeError, match="out of memory"), training.run.step(ids):  # noqa: PT012
        LOSS(training.model, batch)
        raise RuntimeError("out of memory")
    training.optimizer.zero_grad()
    training.step()
    is_whole(training.close(), steps=2)


def test_step_after_close() -> None:
    training = Training()
    training.step()
    ledger = training.close()
    training.run.close()  # closing again does nothing
    with pytest.raises(assay.AssayError, match="close") as error:
        training.step()
    one_line(error)
    is_whole(ledger, steps=1)


def test_close_in_the_middle_of_a_step() -> None:
    """A micro-batch that no optimizer step followed moved nothing: the steps before it stand."""
    training = Training()
    training.step()
    ids, batch = training.data[1][0]
    with training.run.step(ids):
        LOSS(training.model, batch).backward()
    is_whole(training.close(), steps=1)


def test_run_is_a_context_manager_and_keeps_what_it_has(tmp_path: Path) -> None:
    """An error in the loop ends the run, whose values until then are on the disk."""
    training = Training(out=tmp_path / "run")
    with pytest.raises(ZeroDivisionError), training.run:  # noqa: PT012
        training.step()
        training.step()
        raise ZeroDivisionError
    is_whole(assay.open(tmp_path / "run"), steps=2)


# --- targets


def _per_sample(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


TARGETS: dict[str, Callable[[nn.Module, Batch], Any]] = {
    "a vector": _per_sample,
    "a number": lambda model, batch: 1.5,
    "nothing": lambda model, batch: None,
    "no gradient": lambda model, batch: torch.tensor(1.5),
    "detached": lambda model, batch: LOSS(model, batch).detach(),
    "nan": lambda model, batch: LOSS(model, batch) * math.nan,
    "infinite": lambda model, batch: LOSS(model, batch) * math.inf,
    "integer": lambda model, batch: torch.tensor(3),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_unusable_target(kind: str) -> None:
    """Said at the start or at the first step, by the target's name, before a weight has moved."""
    model = CASE.model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(assay.InputError, match="'held_out'") as error:
        Training(model=model, target_loss=TARGETS[kind]).step()
    message = one_line(error)
    if kind in ("a vector", "a number", "nothing"):
        assert "scalar" in message
    if kind in ("nan", "infinite"):
        assert "nan" in message.lower() or "inf" in message.lower()
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_target_that_becomes_nan() -> None:
    """Later on it does not stop the training: its steps are booked as "nan" and the ones before stay."""
    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return LOSS(model, batch) * (math.nan if calls > 4 else 1.0)

    training = Training(target_loss=loss)
    for _ in range(6):
        training.step()
    ledger = training.close()
    status = ledger.account("held_out")["status"].to_list()
    assert len(status) == 6
    assert status[:2] == ["ok", "ok"]
    assert status[-1] == "nan"
    assert ledger.values("held_out")["value"].is_finite().all()


def test_error_in_the_targets_own_loss_leaves_the_model_in_order() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise KeyError("labels")

    model = CASE.model()
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="labels"):
        Training(model=model, target_loss=loss).step()
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "make",
    [
        lambda: assay.InRunShapley(targets={}),
        lambda: assay.InRunShapley(targets={"a": LOSS}),  # type: ignore[dict-item]
        lambda: assay.InRunShapley(targets={"a": assay.Target([1], LOSS)}, path="nearest"),
        lambda: assay.InRunShapley(targets={"a": assay.Target([1], LOSS)}, momentum="all"),
        lambda: assay.Target([], LOSS),
        lambda: assay.Target([1], "cross_entropy"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_do_not_exist(make: Callable[[], object]) -> None:
    with pytest.raises(assay.InputError) as error:
        make()
    one_line(error)


# --- numbers that are not finite


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_nan_step_that_the_loop_skips(factor: float) -> None:
    """A loss that is NaN, noticed by the loop before the step: the weights stay, and so do all other values."""
    training, plain = Training(), Training()
    for number in range(5):
        if number == 2:
            ids, batch = training.data[number][0]
            with training.run.step(ids):
                (LOSS(training.model, batch) * factor).backward()
            training.optimizer.zero_grad()
            training.taken += 1
            plain.taken += 1
            continue
        training.step()
        plain.step()
    ledger, expected = training.close(), plain.close()
    finite = ledger.steps("held_out").drop_nans("value")
    assert finite["id"].to_list() == expected.steps("held_out")["id"].to_list()
    assert finite["value"].to_list() == pytest.approx(expected.steps("held_out")["value"].to_list(), rel=1e-9)
    status = ledger.account("held_out")["status"].to_list()
    assert status.count("ok") == 4
    assert set(status) <= {"ok", "nan", "skipped"}


def test_nan_step_that_the_loop_takes() -> None:
    """From then on the weights are NaN, which is the user's to see; the run goes on and says so."""
    training = Training()
    for number in range(5):
        training.step(lambda m, b, n=number: LOSS(m, b) * (math.nan if n == 2 else 1.0))  # type: ignore[misc]
    ledger = training.close()
    assert ledger.account("held_out")["status"].to_list() == ["ok", "ok", "nan", "nan", "nan"]
    values = ledger.values("held_out")
    assert values["value"].is_finite().all()
    first = ledger.steps("held_out").filter(ledger.steps("held_out")["step"] < 2)
    assert values["value"].sum() == pytest.approx(first["value"].sum(), rel=1e-12)


def test_nan_in_a_parameter_that_the_target_does_not_use() -> None:
    """0·NaN must not hide in a sum: either the value is NaN and booked so, or it is right."""
    training = Training()
    training.step()
    with torch.no_grad():
        training.model.get_parameter("net.3.bias")[0] = math.nan
    training.step()
    assert training.close().account("held_out")["status"].to_list()[1] == "nan"


# --- optimizers


def test_optimizer_of_another_model() -> None:
    other = CASE.model(seed=2)
    with pytest.raises(assay.InputError, match="optimizer") as error:
        Training(build=lambda m: SGD(other.parameters(), lr=0.1))
    assert "parameter" in one_line(error)


def test_optimizer_of_a_part_of_the_model() -> None:
    """What the optimizer does not own does not move, so that its gradients count for nothing."""
    frozen = CASE.model()
    for layer in ("net.0", "net.2"):
        frozen.get_submodule(layer).requires_grad_(False)
    training = Training(build=lambda m: SGD(m.get_submodule("net.3").parameters(), lr=0.1))
    reference = Training(
        model=frozen, build=lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    )
    for _ in range(3):
        training.step()
        reference.step()
    a, b = (t.close().steps("held_out")["value"].to_list() for t in (training, reference))
    assert a == pytest.approx(b, rel=1e-9)


class Lion(Optimizer):
    """Moves by the sign of the gradient: not linear in it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * param.grad.sign())


def test_unsupported_optimizer_is_refused_by_name() -> None:
    with pytest.raises(assay.UnsupportedOptimizerError, match="Lion") as error:
        Training(build=lambda m: Lion(m.parameters(), lr=1e-3))
    message = one_line(error)
    assert "AdamW" in message
    assert 'optimizer_model="sgd"' in message or "optimizer_model='sgd'" in message


def test_unsupported_optimizer_taken_for_sgd_on_request() -> None:
    """As if each step had been plain SGD with that optimizer's learning rate."""
    training = Training(build=lambda m: Lion(m.parameters(), lr=1e-3), optimizer_model="sgd")
    training.step()
    plain = Training(build=lambda m: SGD(m.parameters(), lr=1e-3))
    plain.step()
    a, b = (t.close().steps("held_out")["value"].to_list() for t in (training, plain))
    assert a == pytest.approx(b, rel=1e-9)


class CustomAdam(AdamW):
    """A subclass may do anything in its step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.sign_()
        super().step(closure)


def test_subclass_with_a_step_of_its_own_is_not_taken_for_its_parent() -> None:
    with pytest.raises(assay.UnsupportedOptimizerError, match="CustomAdam") as error:
        Training(build=lambda m: CustomAdam(m.parameters(), lr=1e-3))
    one_line(error)


def test_lbfgs_is_refused() -> None:
    with pytest.raises(assay.UnsupportedOptimizerError, match="LBFGS"):
        Training(build=lambda m: torch.optim.LBFGS(m.parameters()))


def test_unknown_optimizer_model() -> None:
    with pytest.raises(assay.InputError, match="optimizer_model") as error:
        Training(optimizer_model="muon")
    one_line(error)


def test_gradient_changed_by_more_than_a_factor_warns() -> None:
    """`clip_grad_value_` is no scale: a warning says that the values assume one."""
    training = Training()
    ids, batch = training.data[0][0]
    with training.run.step(ids):
        LOSS(training.model, batch).backward()
    nn.utils.clip_grad_value_(training.model.parameters(), 1e-3)
    training.update()
    with pytest.warns(assay.AssayWarning, match="clip"):
        training.close()


# --- coverage


def test_uncovered_parameter_is_named() -> None:
    """Without the start-up check, which would have found a slower way for it."""
    with pytest.raises(assay.CoverageError, match="gain") as error:
        Training(model=WithCube().double(), check="off").step()
    message = one_line(error)
    assert "exclude" in message
    assert "inner" not in message


class ReturnsItsLoss(nn.Module):
    """A model that gives nothing per sample, so that nothing but the gradient itself can be checked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = WithCube()

    def forward(self, batch: Batch) -> Tensor:
        return LOSS(self.inner, batch)


def test_uncovered_parameter_of_a_model_that_returns_its_loss() -> None:
    with pytest.raises(assay.CoverageError, match="gain") as error:
        Training(model=ReturnsItsLoss().double(), target_loss=lambda m, b: m(b)).step(lambda m, b: m(b))
    one_line(error)


@pytest.mark.parametrize("check", ["first", "off"])
def test_uncovered_parameter_with_single_samples(check: str) -> None:
    training = Training(model=WithCube().double(), check=check)
    ids, batch = training.data[0][0]
    with (
        pytest.raises(assay.CoverageError, match="gain") as error,
        training.run.step(ids[:1]),
    ):
        LOSS(training.model, {name: x[:1] for name, x in batch.items()}).backward()
    one_line(error)


def test_exclude_leaves_the_parameter_out_and_says_so() -> None:
    """The rest is valued as if the parameter were frozen; coverage reports what is missing."""
    model, frozen = WithCube().double(), WithCube().double()
    frozen.load_state_dict(model.state_dict())
    frozen.gain.requires_grad_(False)
    excluded = Training(model=model, exclude=["gain"], build=lambda m: SGD(m.parameters(), lr=0.1))
    reference = Training(
        model=frozen, build=lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    )
    excluded.step()
    reference.step()
    a, b = (t.close().steps("held_out")["value"].to_list() for t in (excluded, reference))
    assert a == pytest.approx(b, rel=1e-9)
    coverage = excluded.run.coverage()
    assert coverage.filter(coverage["parameter"] == "gain")["status"].to_list() == ["excluded"]


def test_exclude_a_parameter_that_does_not_exist() -> None:
    with pytest.raises(assay.InputError, match="exclude") as error:
        Training(exclude=["net.0.wieght"])
    assert "net.0.wieght" in one_line(error)


@pytest.mark.parametrize(
    "penalised",
    [
        lambda loss, weight: loss + 0.1 * weight.square().sum(),
        lambda loss, weight: loss * (1 + weight.norm()),
        lambda loss, weight: torch.stack([loss, weight.abs().mean()]).sum(),
    ],
    ids=["sum", "product", "stack"],
)
def test_regulariser_on_a_weight_is_named(penalised: Callable[[Tensor, Tensor], Tensor]) -> None:
    """λ|w|² in the loss belongs to no sample: refused by name, never shared out in silence."""

    def regularised(model: nn.Module, batch: Batch) -> Tensor:
        return penalised(LOSS(model, batch), model.get_parameter("net.0.weight"))

    with pytest.raises(assay.CoverageError, match=r"net\.0\.weight") as error:
        Training().step(regularised)
    assert "net.3" not in one_line(error)


def test_weights_used_through_their_data_are_noticed() -> None:
    """`.data` cuts the graph: `.grad` has nothing of that use, and neither may the values."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x @ self.inner.weight.data.t()  # type: ignore[no-any-return]

    class Copied(nn.Module):
        def __init__(self, cut: nn.Module) -> None:
            super().__init__()
            self.inner = nn.Linear(7, 5).double()
            self.inner.load_state_dict(cut.get_submodule("inner").state_dict())
            self.still: Tensor
            self.register_buffer("still", self.inner.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x @ self.still.t()  # type: ignore[no-any-return]

    cut = Cut().double()
    copied = Copied(cut)
    a, b = Training(model=cut), Training(model=copied)
    a.step()
    b.step()
    first, second = (t.close().steps("held_out")["value"].to_list() for t in (a, b))
    assert first == pytest.approx(second, rel=1e-9)


# --- the disk


def test_folder_that_already_holds_a_run(tmp_path: Path) -> None:
    """The old run is still there, to the last value."""
    training = Training(out=tmp_path / "run")
    training.step()
    values = training.close().values("held_out")
    with pytest.raises(assay.StoreError, match="already holds a run") as error:
        Training(out=tmp_path / "run")
    assert "run" in one_line(error)
    assert assay.open(tmp_path / "run").values("held_out").equals(values)


def test_refused_run_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model = CASE.model()
    opt = SGD(model.parameters(), lr=0.1)
    target = assay.Target([CASE.batch(3, seed=7)], LOSS)
    hooks = len(opt._optimizer_step_pre_hooks), len(opt._optimizer_step_post_hooks)
    with pytest.raises(assay.StoreError, match="file") as error:
        assay.Run(
            model, opt, out=tmp_path / "file", methods=[assay.InRunShapley(targets={"held_out": target})]
        )
    one_line(error)
    assert (len(opt._optimizer_step_pre_hooks), len(opt._optimizer_step_post_hooks)) == hooks


@contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions bind the superuser too, inside."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
def test_read_only_disk(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with without_privileges(), pytest.raises(assay.StoreError, match=r"cannot write .*run") as error:
            Training(out=tmp_path / "run")
        one_line(error)
    finally:
        tmp_path.chmod(0o755)


FULL_DISK = """
import resource, signal, sys
import torch
sys.path.insert(0, {tests!r})
import assay
from test_errors import Training, is_whole

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
training = Training(out={out!r})
training.step()
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))  # from here on no file can grow
training.step()
try:
    training.run.close()
except assay.StoreError as error:
    print(error)
else:
    sys.exit("no error although the disk is full")
is_whole(training.run.ledger, steps=2)  # in memory
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
training.run.close()
is_whole(assay.open({out!r}), steps=2)  # on the disk, once there is room
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_full_disk(tmp_path: Path) -> None:
    """The error names the folder and says that nothing is lost; closing again, with room, writes all of it."""
    code = FULL_DISK.format(tests=str(Path(__file__).parent), out=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "run") in done.stdout
    assert "lost" in done.stdout


def test_disk_that_refuses_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that fails, again and again, neither drops a row nor books one twice."""
    full = True

    def write_or_refuse(self: Recording, write: Callable[[Recording], None] = Recording.flush) -> None:
        if full:
            raise assay.StoreError("no space left on device: free some")
        write(self)

    monkeypatch.setattr(Recording, "flush", write_or_refuse)
    training = Training(out=tmp_path / "run")
    training.run.writer._flush_every = training.run.writer._flush_at = 1  # as often as can be
    for _ in range(3):
        training.step()
        with suppress(assay.StoreError):
            training.run.status()
    for _ in range(2):
        with pytest.raises(assay.StoreError):
            training.run.close()
    full = False
    training.run.close()
    is_whole(assay.open(tmp_path / "run"), steps=3)


def test_folder_that_disappears_while_the_run_goes_on(tmp_path: Path) -> None:
    """The values stay in memory, and reach the disk once the folder is back."""
    training = Training(out=tmp_path / "run")
    training.step()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    training.step()
    with pytest.raises(assay.StoreError) as error:
        training.run.close()
    one_line(error)
    is_whole(training.run.ledger, steps=2)
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    training.run.close()
    is_whole(assay.open(tmp_path / "run"), steps=2)


def test_run_with_nothing_in_it(tmp_path: Path) -> None:
    """A run that ends before its first step leaves an empty ledger, not a broken one."""
    Training(out=tmp_path / "run").close()
    ledger = assay.open(tmp_path / "run")
    assert ledger.values("held_out").is_empty()
    assert math.isnan(ledger.explained("held_out"))
    assert np.isnan(ledger.explained("held_out"))


def test_open_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(assay.StoreError) as error:
        assay.open(tmp_path)
    assert str(tmp_path) in one_line(error)
