"""The index against explicit dense matrices in float64: every score by the formula, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import CASES
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import AssayWarning, InputError, StoreError
from assay.index import Index
from assay.index.header import read_header, stored_sides
from assay.index.scores import _Best
from assay.projection import Projection, random_sides
from assay.rows import Folder

Batch = tuple[Tensor, Tensor]
N = 23


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.LayerNorm(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def loss_fn(model: nn.Module, batch: object) -> Tensor:
    x, y = batch  # type: ignore[misc]
    return F.cross_entropy(model(x), y)


def data(n: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 7, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)


def batches(n: int = N, seed: int = 1, sizes: int = 5) -> list[tuple[list[str], Batch]]:
    x, y = data(n, seed)
    return [
        ([f"example {j}" for j in range(i, min(i + sizes, n))], (x[i : i + sizes], y[i : i + sizes]))
        for i in range(0, n, sizes)
    ]


def queries() -> list[Batch]:
    x, y = data(5, 2)
    return [(x[:3], y[:3]), (x[3:], y[3:])]


PROJECTION = Projection(rank=3, seed=4)


def build(model: nn.Module, **options: object) -> Index:
    settings = {"projection": PROJECTION, "dtype": "fp64", "shard": 4, **options}
    return Index.build(model, batches(), loss_fn, **settings)  # type: ignore[arg-type]


def dense_rows(model: nn.Module, data: Batch, projection: Projection = PROJECTION) -> dict[str, Tensor]:
    """`[n, width]` by layer: each example alone through autograd, then through the matrices."""
    rows: dict[str, list[Tensor]] = {}
    for x, y in zip(*data, strict=True):
        loss = loss_fn(model, (x[None], y[None]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        parts: dict[str, list[Tensor]] = {}
        for (name, param), g in zip(model.named_parameters(), gradients, strict=True):
            sides = random_sides(name, param, projection)
            matrix = g.reshape(sides.matrix)
            if sides.left is not None:
                matrix = sides.left.double() @ matrix
            if sides.right is not None:
                matrix = matrix @ sides.right.double().t()
            parts.setdefault(name.rpartition(".")[0], []).append(matrix.flatten())
        for layer, blocks in parts.items():
            rows.setdefault(layer, []).append(torch.cat(blocks))
    return {layer: torch.stack(r) for layer, r in rows.items()}


def inverse(rows: Tensor, damping: float) -> Tensor:
    fisher = rows.t() @ rows / len(rows)
    damped = fisher + damping * torch.linalg.eigvalsh(fisher).mean() * torch.eye(
        len(fisher), dtype=fisher.dtype
    )
    return torch.linalg.inv(damped)


def dense_influence(model: nn.Module, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """`[Q, N]` influence, `[N]` self-influence, `[N]` lengths."""
    examples, asked = dense_rows(model, data(N, 1)), dense_rows(model, data(5, 2))
    inverses = {layer: inverse(rows, damping) for layer, rows in examples.items()}
    scores = torch.stack([asked[k] @ inverses[k] @ examples[k].t() for k in examples]).sum(0)
    own = torch.stack([((examples[k] @ inverses[k]) * examples[k]).sum(1) for k in examples]).sum(0)
    return scores, own, torch.cat(list(examples.values()), 1).norm(dim=1)


def assert_close(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == truth.shape
    assert (found - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("damping", [0.1, 1e-3, 10.0])
def test_influence_is_the_dense_formula(damping: float) -> None:
    model = net()
    index = build(model)
    scores, own, lengths = dense_influence(model, damping)
    assert_close(index.influence(model, queries(), loss_fn, damping=damping), scores)
    found = index.self_influence(damping=damping)
    assert found["id"].to_list() == [f"example {i}" for i in range(N)]
    assert_close(found["self_influence"].to_torch(), own)
    relatif = index.influence(model, queries(), loss_fn, damping=damping, normalize="relatif")
    assert_close(relatif, scores / own.sqrt())
    assert_close(index.influence(model, queries(), loss_fn, damping, "unit"), scores / lengths)


def test_a_later_damping_is_respected_by_the_same_index() -> None:
    model = net()
    index = build(model)
    for damping in (0.1, 1.0, 0.1):
        scores, own, _ = dense_influence(model, damping)
        assert_close(index.influence(model, queries(), loss_fn, damping=damping), scores)
        assert_close(index.self_influence(damping=damping)["self_influence"].to_torch(), own)


def test_positive_is_helpful() -> None:
    """A convex model trained without its most helpful example has a higher loss on the query."""
    torch.manual_seed(0)
    model = nn.Linear(7, 4, bias=False).double()
    x, y = data(60, 5)
    asked = data(1, 6)

    def fit(keep: Tensor) -> nn.Module:
        fitted = nn.Linear(7, 4, bias=False).double()
        nn.init.zeros_(fitted.weight)
        optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            decay = 1e-2 * fitted.weight.square().sum()
            loss = F.cross_entropy(fitted(x[keep]), y[keep], reduction="sum") / len(x) + decay
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        return fitted

    everything = torch.ones(60, dtype=torch.bool)
    model = fit(everything)  # type: ignore[assignment]
    index = Index.build(
        model, [(list(range(60)), (x, y))], loss_fn, projection=Projection(kind="none"), dtype="fp64"
    )
    scores = index.influence(model, [asked], loss_fn)[0]
    base = loss_fn(model, asked).item()
    true = []
    for i in range(60):
        keep = everything.clone()
        keep[i] = False
        true.append(loss_fn(fit(keep), asked).item() - base)
    truth = torch.tensor(true, dtype=torch.float64)
    assert true[int(scores.argmax())] > 0 > true[int(scores.argmin())]
    assert torch.corrcoef(torch.stack([scores, truth]))[0, 1] > 0.8
    assert (
        0.2 < float((scores / 60 * truth).sum() / truth.square().sum()) < 5
    )  # over N: in the loss's own unit


@pytest.mark.parametrize("normalize", [None, "relatif", "unit"])
@pytest.mark.parametrize("k", [1, 6, N, 100])
def test_search_is_the_sorted_matrix(k: int, normalize: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    index = build(model)
    monkeypatch.setattr("assay.rows.reader.RowReader.piece_rows", lambda self: 4)  # several pieces
    found = index.search(model, queries(), loss_fn, k=k, normalize=normalize)  # type: ignore[arg-type]
    scores = index.influence(model, queries(), loss_fn, normalize=normalize)  # type: ignore[arg-type]
    best, order = scores.sort(dim=1, descending=True)
    expected = [
        (q, rank + 1, f"example {int(order[q, rank])}", float(best[q, rank]))
        for q in range(5)
        for rank in range(min(k, N))
    ]
    assert found.columns == ["query", "rank", "id", "score"]
    for row, truth in zip(found.rows(), expected, strict=True):
        assert row[:3] == truth[:3]
        assert abs(row[3] - truth[3]) <= 1e-10 * float(best.abs().max())


def test_search_never_holds_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    index = build(model)
    monkeypatch.setattr("assay.rows.reader.RowReader.piece_rows", lambda self: 4)
    shapes = {}
    of_piece = _Best.of_piece

    def seen(self: _Best, start: int, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shapes[start] = tuple(scores.shape)
        return of_piece(self, start, scores)

    monkeypatch.setattr(_Best, "of_piece", seen)
    index.search(model, queries(), loss_fn, k=2)
    assert shapes == dict.fromkeys(range(0, 20, 4), (5, 4)) | {20: (5, 3)}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2), ("fp16", 5e-3), ("int8", 5e-2)]
)
def test_narrow_rows_are_close(dtype: str, tolerance: float) -> None:
    model = net()
    found = build(model, dtype=dtype).influence(model, queries(), loss_fn)
    assert_close(found.double(), dense_influence(model, 0.1)[0], tolerance)


def test_a_layer_without_gradients_adds_nothing() -> None:
    class Gated(Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * self.idle(x)

    torch.manual_seed(0)
    model = Gated().double()
    found = build(model)
    without = build(model, exclude=["idle.*"])
    assert_close(found.influence(model, queries(), loss_fn), without.influence(model, queries(), loss_fn))
    assert found.layers["layer"].to_list() == ["body.0", "body.2", "head", "idle"]
    assert without.layers["layer"].to_list() == ["body.0", "body.2", "head"]


def test_layers_by_name_and_by_type() -> None:
    model = net()
    assert build(model, layers=["head"]).layers["parameters"].to_list() == ["head.weight, head.bias"]
    assert build(model, layers=[nn.Linear]).layers["layer"].to_list() == ["body.0", "head"]
    named = build(model, layers=["body.*.weight"], exclude=["body.2*"])
    assert named.layers["parameters"].to_list() == ["body.0.weight"]
    with pytest.raises(InputError, match=r"did you mean 'head\."):
        build(model, layers=["heed.weight"])
    with pytest.raises(InputError, match="no such module"):
        build(model, layers=[nn.Conv2d])


def test_a_language_model_with_its_own_batches() -> None:
    """Dicts of tensors, tied embeddings: the identity curvature is the plain inner product of gradients."""
    case = CASES["gpt2"]
    loss = case.losses["sum"]
    model, examples, asked = case.model(), case.batch(6, seed=3), case.batch(4, seed=5)
    model.eval()
    index = Index.build(
        model, [(range(6), examples)], loss, projection=Projection(kind="none"), dtype="fp64", reduction="sum"
    )

    def gradients(batch: dict[str, Tensor], n: int) -> Tensor:
        rows = []
        for i in range(n):
            found = torch.autograd.grad(loss.part(model, batch, i), list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)

    truth = gradients(asked, 4) @ gradients(examples, 6).t()
    assert_close(index.influence(model, [asked], loss, curvature="identity"), truth)


def test_an_index_on_disk_is_opened_again(tmp_path: Path) -> None:
    model = net()
    built = build(model, out=tmp_path / "idx")
    opened = Index.open(tmp_path / "idx")
    assert len(opened) == N
    assert torch.equal(
        opened.influence(model, queries(), loss_fn), built.influence(model, queries(), loss_fn)
    )
    with pytest.raises(StoreError, match="already holds an index"):
        build(model, out=tmp_path / "idx")
    shard = tmp_path / "idx" / "rows" / "data" / "c" / "2" / "0"
    shard.write_bytes(shard.read_bytes()[:-9] + b"something")
    with pytest.raises(StoreError, match="c/2/0"):
        Index.open(tmp_path / "idx").influence(model, queries(), loss_fn)
    with pytest.raises(StoreError, match="no index"):
        Index.open(tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["random", "pca"])
def test_a_support_is_stored_with_the_rows(kind: Any, tmp_path: Path) -> None:
    """Rows are the rows of P times each example's own gradient, and an index that is opened has the same P."""
    model = net()
    projection = Projection(rank=2, kind=kind, seed=4, support=4)
    index = build(model, projection=projection, out=tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    scores = index.influence(model, queries(), loss_fn)
    assert_close(opened.influence(model, queries(), loss_fn), scores)
    header = read_header(Folder(tmp_path / "index"))
    assert header is not None
    sides = stored_sides(Folder(tmp_path / "index"), header)
    assert any(own.narrow for own in sides.values())
    x, y = data(N, 1)
    gradients = torch.autograd.grad(loss_fn(model, (x[:1], y[:1])), list(model.parameters()))
    expected = [
        rows.flatten(1) @ g.flatten()
        for own, g in zip(sides.values(), gradients, strict=True)
        for rows in own.directions(g)
    ]
    assert_close(opened.gradients(0, 1)[0], torch.cat(expected))
    if kind == "random":
        assert all(own.entries is not None for own in sides.values() if own.narrow)


def test_refusals() -> None:
    model = net()
    index = build(model)
    with pytest.raises(InputError, match="damping=-1"):
        index.influence(model, queries(), loss_fn, damping=-1)
    with pytest.raises(InputError, match="singular"):
        build(model, projection=Projection(kind="none")).influence(model, queries(), loss_fn, damping=0.0)
    with pytest.raises(InputError, match="normalize='l2'"):
        index.influence(model, queries(), loss_fn, normalize="l2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k=0"):
        index.search(model, queries(), loss_fn, k=0)
    with pytest.raises(InputError, match="there is none"):
        index.influence(model, [], loss_fn)
    with pytest.raises(InputError, match="share dimension 0"):
        index.influence(model, [(torch.zeros(3, 7).double(), torch.zeros(2).long())], loss_fn)
    with pytest.raises(InputError, match="needs the principal axes"):
        index.influence(model, queries(), loss_fn, curvature="ekfac")
    with pytest.raises(InputError, match=r"'body\.0\.weight'"):
        index.influence(nn.Linear(7, 4).double(), queries(), loss_fn)
    with pytest.warns(AssayWarning, match="two different checkpoints"):
        index.influence(net(seed=3), queries(), loss_fn)
    with pytest.raises(InputError, match="no example"):
        Index.build(model, [], loss_fn)
    with pytest.raises(InputError, match="reduction='sums'"):
        build(model, reduction="sums")
    with pytest.raises(InputError, match="4 examples were announced"):
        Index.build(model, [(["a", "b", "c", "d"], data(5, 1))], loss_fn)
