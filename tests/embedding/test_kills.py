"""A run that was killed keeps what it had committed; a disk that refuses loses nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import assay
from assay.doctor import examine
from assay.rows import Folder, RowWriter
from assay.rows.background import Background
from tests.embedding.runs import STEPS, order, record, recorded

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.mark.parametrize("steps", [24, 50])
def test_a_killed_run_opens_with_its_committed_steps(steps: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= steps:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    ledger = assay.open(tmp_path / "run")
    found = ledger.embeddings(segments=1)
    taken = found.rows["step"].unique(maintain_order=True).to_list()
    assert taken == list(range(len(taken)))  # whole steps from the first on; a part of one is left out
    assert len(taken) >= (steps - 16) * 4 // 7 * 7 // 4 - 1
    assert found.rows["id"].to_list() == list(range(4 * len(taken)))
    assert bool(torch.isfinite(found.export()).all())


def test_what_a_disk_refuses_is_offered_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, plain = record("sgd", out=tmp_path / "plain", shard=5)
    commit, refusals = RowWriter._commit, 3

    def refuse(self: RowWriter, number: int) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise assay.StoreError("cannot write rows (No space left on device): free some space")
        commit(self, number)

    monkeypatch.setattr(RowWriter, "_commit", refuse)
    from tests.embedding.runs import OPTIMIZERS, data, loss_fn, network

    model = network()
    opt = OPTIMIZERS["sgd"](model.parameters())
    method = assay.DataValueEmbedding(assay.Projection(kind="none"), dtype="fp64", shard=5, queue=1)
    run = assay.Run(model, opt, out=tmp_path / "run", methods=[method])
    x, y = data()
    refused = 0
    for ids in order():
        with run.step(ids):
            loss_fn(model, (x[ids], y[ids])).backward()
        try:
            opt.step()
        except assay.StoreError as error:
            refused += "nothing recorded is lost" in str(error)
            with torch.no_grad():  # the loop goes on with the step that the error kept it from
                for p in model.parameters():
                    p -= 0.2 * p.grad
        opt.zero_grad()
    run.close()
    assert refused >= 1
    a, b = recorded(plain), recorded(run)
    assert len(b.steps) == STEPS
    torch.testing.assert_close(b.read(0, b.length), a.read(0, a.length))


def test_a_build_that_is_broken_off_anywhere_stays_whole_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where it removes what the one before it had left, half of it."""
    _, run = record("sgd", out=tmp_path / "run", shard=5)
    run.close()
    ledger, calls = assay.open(tmp_path / "run"), [0]
    original = Folder.write, Folder.delete

    def dying(act: Any) -> Any:
        def acts(self: Folder, *args: Any) -> None:
            calls[0] -= 1
            if not calls[0]:
                raise KeyboardInterrupt
            act(self, *args)

        return acts

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", dying(original[0]))
        patch.setattr(Folder, "delete", dying(original[1]))
        for lived in range(1, 40):
            calls[0] = lived % 13 + 1
            with suppress(KeyboardInterrupt):
                ledger.embeddings(segments=3)
                break
            assert examine(tmp_path / "run").whole
            for done in (tmp_path / "run").rglob("done.json"):
                if lived % 3 == 0:
                    done.unlink()  # so that what is there is removed and made again
    assert lived > 5
    _, whole = record("sgd", shard=5)
    whole.close()
    expected = whole.ledger.embeddings(segments=3).export()
    assert torch.equal(ledger.embeddings(segments=3).export(), expected)


def test_the_queue_to_the_disk_is_bounded() -> None:
    """Training waits once `waiting` steps are on their way."""
    gate, done = threading.Event(), []

    def slow(n: int) -> None:
        gate.wait(10)
        done.append(n)

    background = Background(slow, 2)
    with background:
        for n in range(3):  # one in work, two waiting
            background.put(n)
        blocked = threading.Thread(target=background.put, args=(3,))
        blocked.start()
        time.sleep(0.1)
        assert blocked.is_alive()
        gate.set()
        blocked.join(10)
    assert done == [0, 1, 2, 3]


def test_rows_that_are_not_finite_are_said_and_stored_as_zeros() -> None:
    import warnings

    from tests.embedding.runs import OPTIMIZERS, network

    model = network()
    opt = OPTIMIZERS["sgd"](model.parameters())
    run: Any = assay.Run(model, opt, methods=[assay.DataValueEmbedding()], check="off")
    with run.step([0, 1]):
        x = torch.ones(2, 4, dtype=torch.float64)
        x[1] = float("inf")
        model(x).logsumexp(1).mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    with pytest.warns(assay.AssayWarning, match="1 recorded gradients were not finite"):
        run.close()
    assert not recorded(run).read(1, 2).any()
