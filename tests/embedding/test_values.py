"""Values for a target that came after training, beside the values of the same target computed while it ran."""

from __future__ import annotations

import pytest
import torch

import assay
from tests.embedding.runs import OPTIMIZERS, data, loss_fn, network, order


def train(optimizer: str, path: str, snapshots: int | None, out: str | None = None) -> assay.Ledger:
    """A run that knows the target and records the gradients."""
    x, y = data()
    model = network()
    opt = OPTIMIZERS[optimizer](model.parameters())
    methods = [
        assay.InRunShapley({"known": target()}, path=path),
        assay.DataValueEmbedding(assay.Projection(kind="none"), dtype="fp64"),
    ]
    with assay.Run(model, opt, out=out, methods=methods, snapshots=snapshots) as run:
        for ids in order():
            with run.step(ids):
                loss_fn(model, (x[ids], y[ids])).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
    return run.ledger


def target() -> assay.Target:
    x, y = data()
    return assay.Target([(x[:4], y[:4]), (x[4:6], y[4:6])], loss_fn)


@pytest.mark.parametrize("path", ["left", "trapezoid"])
@pytest.mark.parametrize("optimizer", ["sgd", "maximized", "momentum", "adamw"])
def test_every_step_a_snapshot_gives_the_values_of_the_run(
    optimizer: str, path: str, tmp_path: object
) -> None:
    ledger = train(optimizer, path, snapshots=1, out=f"{tmp_path}/run")
    found = assay.open(f"{tmp_path}/run").value_for(target(), network(), path)  # type: ignore[arg-type]
    expected = ledger.steps("known")
    assert found.select("step", "id").equals(expected.select("step", "id"))
    pair = [torch.from_numpy(frame["value"].to_numpy().copy()) for frame in (found, expected)]
    torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-12)


def test_between_snapshots_the_gradient_is_interpolated() -> None:
    ledger = train("sgd", "left", snapshots=4)
    found, expected = ledger.value_for(target(), network()), ledger.steps("known")
    apart = (found["value"] - expected["value"]).abs().to_numpy()
    steps = found["step"].to_numpy()
    at_snapshots = (steps % 4 == 0) | (steps == steps.max() + 1)
    assert apart[at_snapshots].max() < 1e-12
    assert 1e-9 < apart[~at_snapshots].max() < 0.1 * expected["value"].abs().max()  # type: ignore[operator]


def test_weights_are_put_back_and_what_is_missing_is_said() -> None:
    ledger = train("sgd", "left", snapshots=None)
    with pytest.raises(assay.InputError, match="needs snapshots"):
        ledger.value_for(target(), network())
    with pytest.raises(assay.InputError, match="choose 'left' or 'trapezoid'"):
        ledger.value_for(target(), network(), "simpson")  # type: ignore[arg-type]
    ledger, model = train("sgd", "left", snapshots=2), network()
    before = [p.detach().clone() for p in model.parameters()]
    ledger.value_for(target(), model)
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was, rtol=0, atol=0)
    assert ledger.rows.equals(ledger.embeddings().rows)


def test_rows_of_a_run_without_snapshots_are_those_recorded() -> None:
    ledger = train("sgd", "left", snapshots=None)
    assert ledger.rows.equals(ledger.steps("known").select("step", "id"))
