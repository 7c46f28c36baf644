"""What is recorded, beside per-sample gradients by plain autograd; and what a run with several methods books."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.capture import Weights, contraction, room
from assay.embedding.header import SCALARS, draw_sides
from assay.embedding.recorded import Recorded
from assay.embedding.session import EmbeddingSession
from tests.embedding.runs import BATCH, CLASSES, OPTIMIZERS, data, loss_fn, network, order, record, recorded


def gradients(model: nn.Module) -> Tensor:
    """`[B, entries]`: of the terms of the first step's loss, at the first weights."""
    x, y = data()
    ids = order()[0]
    terms = F.cross_entropy(model(x[ids]), y[ids], reduction="none") / len(ids)
    rows = [torch.autograd.grad(term, list(model.parameters()), retain_graph=True) for term in terms]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def weights_of(model: nn.Module) -> Weights:
    return Weights(model.named_parameters(), dict.fromkeys(model.parameters(), 0))


def projected(g: Tensor, found: Recorded, inverse: bool = False) -> Tensor:
    """`[B, width]`: by the projection written out as one matrix per parameter, balanced by R or by R⁻¹."""
    weights = weights_of(network())
    header, parts, start = found.header, [], 0
    params = {name: p for p, name in weights.names.items()}
    for name, sides in header.sides(found.folder, weights).items():
        rows, columns = sides.matrix
        left = torch.eye(rows if sides.rows is None else 3) if sides.left is None else sides.left
        right = torch.eye(columns if sides.columns is None else 3) if sides.right is None else sides.right
        drawn = draw_sides({name: params[name]}, header.projection, header.ranks)[name]
        if sides.signs is not None and drawn.signs is not None:
            signs = inverted(sides.signs, drawn.signs) if inverse else sides.signs
            sketch = torch.cat([d.flatten(1) for d in replace(sides, signs=signs).directions(g)])
            parts.append(g[:, start : start + rows * columns] @ sketch.t())
            start += rows * columns
            continue
        if inverse:
            left = inverted(left, drawn.left)
            right = inverted(right, drawn.right)
        left, right = (
            matrix if read is None else matrix.double() @ torch.eye(width)[read].double()
            for matrix, read, width in ((left, sides.rows, rows), (right, sides.columns, columns))
        )
        own = g[:, start : start + rows * columns]
        parts.append(own @ torch.kron(left.double(), right.double()).t())
        start += rows * columns
        assert name in found.header.shapes
    return torch.cat(parts, 1)


def inverted(stored: Tensor, drawn: Tensor | None) -> Tensor:
    """P R⁻¹ from P R and P."""
    plain = torch.eye(len(stored)) if drawn is None else drawn
    return torch.where(stored != 0, plain.square() / stored, 0.0)


@pytest.mark.parametrize(
    ("kind", "support"), [("none", None), ("random", None), ("pca", None), ("random", 3), ("pca", 3)]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rows_are_projected_gradients(optimizer: str, kind: Any, support: int | None) -> None:
    rank = None if kind == "none" else 2
    axes = assay.Target([data()], loss_fn) if kind == "pca" else None
    projection = assay.Projection(rank=rank or 64, kind=kind, support=support)
    _, run = record(optimizer, projection=projection, axes=axes)
    found = recorded(run)
    g = gradients(network())
    rows = found.read(0, BATCH)
    torch.testing.assert_close(rows[:, 0], projected(g, found), rtol=1e-6, atol=1e-9)
    if optimizer == "adamw":  # at its first step, √v̂ is the size of the gradient itself
        D = 1 / (g.sum(0).abs() + 1e-8)
        torch.testing.assert_close(
            rows[:, 1], projected(g * D, found, kind == "random"), rtol=1e-5, atol=1e-8
        )
        if kind == "random":
            plain = draw_sides(
                dict(network().named_parameters()), found.header.projection, found.header.ranks
            )
            balanced = found.header.sides(found.folder, weights_of(network()))
            part = "left" if support is None else "signs"
            pair = (getattr(sides["0.weight"], part) for sides in (balanced, plain))
            assert not torch.allclose(*pair)


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_with_a_support_nothing_waits_for_the_step_but_what_is_read(
    curvature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a weight 3 entries of a side wait for D; beside another method, which keeps all, the rows are the same."""
    seen: list[int] = []
    before = EmbeddingSession.before_update

    def look(self: EmbeddingSession, step: int, batches: Any, *rest: Any) -> None:
        for batch in batches:
            assert not batch.kept
            for vector in self._vectors(batch):
                assert not vector.kept
                tensors = [t for _, f, _ in vector.small for t in vars(f).values() if isinstance(t, Tensor)]
                seen.append(sum(t.untyped_storage().nbytes() // t.itemsize for t in tensors))
        before(self, step, batches, *rest)

    monkeypatch.setattr(EmbeddingSession, "before_update", look)
    settings: dict[str, Any] = {
        "projection": assay.Projection(rank=2, support=3), "curvature": curvature, "draws": 2,
    }  # fmt: skip
    _, alone = record("adamw", **settings)
    assert seen[-1] == BATCH * (3 + 3 + 5 + 3 + 3 + CLASSES)  # pairs of both sides, and the biases
    assert max(seen) == BATCH * (
        3 * 3 + 5 + 3 * 3 + CLASSES
    )  # the first batch is compared with autograd as a whole
    x, y = data()
    target = assay.Target([(x[:6], y[:6])], loss_fn)
    for memory in ("keep", "recompute"):
        shapley = assay.InRunShapley({"one": target}, path="trapezoid", memory=memory)  # type: ignore[arg-type]
        _, beside = record("adamw", methods=[shapley], **settings)
        torch.testing.assert_close(recorded(beside).read(0, 36), recorded(alone).read(0, 36))


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_the_diagonal_is_the_same_where_it_is_read_and_as_a_whole(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on D is formed at the entries that are read alone."""
    projection = assay.Projection(rank=2, support=3)
    _, small = record(optimizer, projection=projection)
    monkeypatch.setattr(EmbeddingSession, "_reads", lambda self: None)
    _, whole = record(optimizer, projection=projection)
    torch.testing.assert_close(
        recorded(small).read(0, 36), recorded(whole).read(0, 36), rtol=1e-12, atol=1e-14
    )


def gauss_newton(model: nn.Module) -> Tensor:
    """`[entries, entries]`: Σ_i Jᵀ (diag(p) − p pᵀ) J / B of the first step, by the Jacobian of the logits."""
    x, _ = data()
    ids = order()[0]
    total = torch.zeros(())
    for row in x[ids]:
        logits = model(row[None])[0]
        J = torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(z, list(model.parameters()), retain_graph=True)]
                )
                for z in logits
            ]
        )
        p = logits.softmax(0).detach()
        total = total + J.t() @ (torch.diag(p) - torch.outer(p, p)) @ J / len(ids)
    return total


def test_all_draws_are_the_gauss_newton_matrix() -> None:
    _, run = record("sgd", curvature="ggn", draws="all")
    j = recorded(run).read(0, BATCH)[:, 1:].flatten(0, 1)
    assert len(j) == BATCH * CLASSES
    torch.testing.assert_close(j.t() @ j, gauss_newton(network()))


def test_random_draws_are_it_in_the_mean() -> None:
    expected = gauss_newton(network())
    _, run = record("sgd", curvature="ggn", draws=600)
    j = recorded(run).read(0, BATCH)[:, 1:].flatten(0, 1)
    assert (j.t() @ j - expected).norm() < 0.1 * expected.norm()


def test_draws_of_adamw_pass_the_preconditioner() -> None:
    _, run = record("adamw", curvature="ggn", draws=2)
    rows = recorded(run).read(0, BATCH)  # g, D g, j, D j, j, D j
    D = 1 / (gradients(network()).sum(0).abs() + 1e-8)
    torch.testing.assert_close(rows[:, 3], rows[:, 2] * D)
    torch.testing.assert_close(rows[:, 5], rows[:, 4] * D)


def test_training_is_the_same_with_and_without_draws() -> None:
    one, _ = record("adamw", curvature="ggn", draws=3)
    two, _ = record("adamw")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_another_loss_is_refused_for_the_gauss_newton_matrix() -> None:
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    run = assay.Run(model, opt, methods=[assay.DataValueEmbedding(curvature="ggn")])
    x, _ = data()
    with pytest.raises(assay.InputError, match="no softmax cross-entropy"), run.step([0, 1, 2]):
        model(x[:3]).square().mean().backward()
    run.close()


def test_weights_of_the_samples_are_those_given_or_equal() -> None:
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    run = assay.Run(model, opt, methods=[assay.DataValueEmbedding(assay.Projection(kind="none"))])
    x, y = data()
    for given in (None, [0.5, 0.25, 0.25]):
        for part in (slice(0, 3), slice(3, 6)):  # two micro-batches
            with run.step([0, 1, 2], given):
                (loss_fn(model, (x[part], y[part])) / 2).backward()
        opt.step()
        opt.zero_grad()
    with pytest.raises(assay.InputError, match="3 ids and weights of shape"), run.step([0, 1, 2], [1.0]):
        pass
    run.close()
    expected = [1 / 6] * 6 + [0.5, 0.25, 0.25] * 2
    torch.testing.assert_close(
        recorded(run).weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def step_unscaled(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """As a loss scaler steps."""
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= scale
    optimizer.step()
    optimizer.zero_grad()


def test_a_loss_scale_that_is_in_the_weights_changes_nothing() -> None:
    """The gradient that backward() leaves and a_i carry the scale S; the measured c takes it out."""
    found = []
    for scale in (1.0, 1024.0):
        model = network()
        opt = OPTIMIZERS["momentum"](model.parameters())
        method = assay.DataValueEmbedding(assay.Projection(kind="none"), dtype="fp64")
        run = assay.Run(model, opt, methods=[method])
        x, y = data()
        for ids in order():
            with run.step(ids, [scale / len(ids)] * len(ids)):
                (scale * loss_fn(model, (x[ids], y[ids]))).backward()
            step_unscaled(opt, model, scale)
        run.close()
        found.append(run.ledger.embeddings().export())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_a_loss_scaler_that_the_run_knows_changes_nothing(curvature: Any, fused: bool) -> None:
    """By default a_i = S / n; a fused optimizer tells S itself."""
    found = []
    for enabled in (False, True):
        model = network().float()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        method = assay.DataValueEmbedding(
            assay.Projection(kind="none"), curvature=curvature, draws="all", dtype="fp64"
        )
        run = assay.Run(model, opt, methods=[method], scaler=None if fused else scaler)
        x, y = data()
        for ids in order():
            with run.step(ids):
                scaler.scale(loss_fn(model, (x[ids].float(), y[ids]))).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        run.close()
        found.append(run.ledger.embeddings(curvature=curvature).export())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_a_loss_scale_that_nobody_tells_is_told_of() -> None:
    model = network()
    opt = OPTIMIZERS["sgd"](model.parameters())
    run = assay.Run(model, opt, methods=[assay.DataValueEmbedding(assay.Projection(kind="none"))])
    x, y = data()
    with run.step([0, 1, 2]):
        (1024.0 * loss_fn(model, (x[:3], y[:3]))).backward()
    step_unscaled(opt, model, 1024.0)
    with pytest.warns(assay.AssayWarning, match=r"multiplied by as little as 0\.00098.*Run\(scaler=\.\.\.\)"):
        run.close()


def test_a_gradient_too_large_for_its_type_costs_no_other_row() -> None:
    model = network()
    opt = OPTIMIZERS["sgd"](model.parameters())
    method = assay.DataValueEmbedding(assay.Projection(kind="none"), dtype="fp16")
    run = assay.Run(model, opt, methods=[method])
    x, y = data()
    for step, ids in enumerate(order()):
        scale = 1e7 if step == 3 else 1.0
        with run.step(ids, [scale / len(ids)] * len(ids)):
            (scale * loss_fn(model, (x[ids], y[ids]))).backward()
        step_unscaled(opt, model, scale)
    with pytest.warns(
        assay.AssayWarning, match=f"{BATCH} recorded gradients .* too large for rows of 'fp16'"
    ):
        run.close()
    found = recorded(run)
    rows = torch.cat([found.read(step.start, step.stop) for step in found.steps])
    empty = (rows.flatten(1) == 0).all(1).nonzero().flatten().tolist()
    assert empty == list(range(3 * BATCH, 4 * BATCH))


@pytest.mark.parametrize("maximize", [False, True])
def test_decay_in_the_gradient_is_weighed_where_the_gradient_is(maximize: bool) -> None:
    """Rows that are never looked up have D = 1/ε under Adam; they move nothing and weigh nothing in D̄."""

    def pulls(rows: int) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, CLASSES)).double()
        table = torch.zeros(6 + rows, 3, dtype=torch.float64)
        table[:6] = model[0].weight.detach()
        model[0] = nn.Embedding.from_pretrained(table, freeze=False)
        opt = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1, maximize=maximize)
        run = assay.Run(model, opt, methods=[assay.DataValueEmbedding(assay.Projection(kind="none"))])
        for ids in order():
            x = torch.tensor([[i % 6, (i // 6) % 6] for i in ids])
            with run.step(ids):
                loss = F.cross_entropy(model(x), data()[1][ids])
                (-loss if maximize else loss).backward()
            opt.step()
            opt.zero_grad()
        run.close()
        at = SCALARS.index("pull")
        return [float(pull) for step in recorded(run).steps for pull in step.scalars[:, at]]

    plain, wider = pulls(0), pulls(2)
    assert wider == pytest.approx(plain, rel=1e-6)
    assert min(plain) > 0
    assert max(plain) < 1e4


@pytest.mark.parametrize("path", ["left", "trapezoid"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_methods_book_what_each_books_alone(optimizer: str, path: str) -> None:
    x, y = data()
    shapley = assay.InRunShapley({"one": assay.Target([(x[:6], y[:6])], loss_fn)}, path=path)
    _, together = record(optimizer, methods=[shapley])
    _, alone = record(optimizer)
    torch.testing.assert_close(recorded(together).read(0, 36), recorded(alone).read(0, 36))
    model = network()
    opt = OPTIMIZERS[optimizer](model.parameters())
    with assay.Run(model, opt, methods=[shapley]) as run:
        for ids in order():
            with run.step(ids):
                loss_fn(model, (x[ids], y[ids])).backward()
            opt.step()
            opt.zero_grad()
    expected, found = run.ledger.steps("one"), together.ledger.steps("one")
    assert found["id"].equals(expected["id"])
    pair = [torch.from_numpy(frame["value"].to_numpy().copy()) for frame in (found, expected)]
    torch.testing.assert_close(*pair)
    with pytest.raises(assay.InputError, match="InRunShapley is there twice"):
        assay.Run(model, opt, methods=[shapley, shapley])


@pytest.mark.parametrize("memory", ["keep", "reduced"])
def test_gradients_formed_a_sample_at_a_time_are_those_formed_at_once(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = data()
    target = assay.Target([(x[:6], y[:6])], loss_fn)
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(
                contraction, "cost_model", lambda device: contraction.CostModel(block_bytes=1)
            )
            monkeypatch.setattr(room, "LARGE", 1)  # memory that one step leaves is the next one's
        shapley = assay.InRunShapley({"one": target}, path="trapezoid", memory=memory)
        model, run = record("adamw", methods=[shapley])
        values = torch.from_numpy(run.ledger.steps("one")["value"].to_numpy().copy())
        found.append((recorded(run).read(0, 36), values, *model.parameters()))
    for once, one_by_one in zip(*found, strict=True):
        torch.testing.assert_close(one_by_one, once, rtol=1e-10, atol=1e-14)


def test_a_budget_is_kept() -> None:
    _, run = record("sgd", projection=assay.Projection(rank=16), budget=30)
    found = recorded(run).header
    assert found.width <= 30
    assert set(found.ranks.values()) == {
        3
    }  # 3·3 + 3 + 3·3 + 3 = 24; rank 4 would take 4·4 + 4 + 3·4 + 3 = 35
    _, run = record("sgd", projection=assay.Projection(rank=2), ranks={"2.weight": 1})
    assert recorded(run).header.width == 2 * 2 + 2 + 1 + 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"curvature": "hessian"}, "choose 'fisher' or 'ggn'"),
        ({"draws": 0}, "whole number from 1 on"),
        ({"queue": 0}, "queue=0"),
        ({"dtype": "fp8"}, "dtype='fp8'"),
        ({"projection": assay.Projection(kind="pca")}, "axes=Target"),
        ({"budget": 2, "projection": assay.Projection(rank=2)}, "rank 1 takes 4 numbers"),
        ({"ranks": {"nothing": 2}}, "no parameter 'nothing'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(assay.InputError, match=words):
        record("sgd", **settings)


def test_questions_that_cannot_be() -> None:
    model, run = record("sgd")
    x, y = data()
    for arguments, words in (
        ({"curvature": "ggn"}, "recorded no Gauss-Newton rows"),
        ({"segments": 0}, "from 1 to the number of steps, 9"),
        ({"blocks": "row"}, "choose 'layer' or 'all'"),
    ):
        with pytest.raises(assay.InputError, match=words):
            run.ledger.embeddings(**arguments)  # type: ignore[arg-type]
    found = run.ledger.embeddings(segments=2)
    with pytest.raises(assay.InputError, match="the nearest that does is"):
        found.influence(model, [(x, y)], loss_fn, at_step=1)
    with pytest.raises(assay.InputError, match="choose 'row' or 'id'"):
        found.influence(model, [(x, y)], loss_fn, by="step")  # type: ignore[arg-type]
    bare = nn.Linear(2, 2)
    plain = assay.Run(bare, torch.optim.SGD(bare.parameters(), lr=0.1), methods=[assay.DataValueEmbedding()])
    plain.close()
    with pytest.raises(assay.InputError, match="recorded no gradients"):
        plain.ledger.embeddings()
