"""Principal axes, KFAC and EKFAC against dense references on a small net."""

from __future__ import annotations

import pytest
import torch
from index.test_index import N, assert_close, data, dense_rows, loss_fn, net, queries
from reference import CASES
from torch import Tensor, nn
from torch.nn import functional as F

from assay.errors import InputError
from assay.index import Index
from assay.index.header import stored_sides
from assay.projection import Projection


class Plain(nn.Module):
    """Two linear layers without biases, so that each layer is one Kronecker product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().double()


def examples() -> list[tuple[list[int], tuple[Tensor, Tensor]]]:
    x, y = data(N, 1)
    return [(list(range(i, min(i + 5, N))), (x[i : i + 5], y[i : i + 5])) for i in range(0, N, 5)]


def indexed(model: nn.Module, rank: int | None) -> Index:
    return Index.build(
        model, examples(), loss_fn, projection=Projection(rank=rank, kind="pca"), dtype="fp64", shard=4
    )


def covariances(model: Plain) -> dict[str, tuple[Tensor, Tensor]]:
    """A = E[a aᵀ] and S = E[b bᵀ] of each layer, from each example alone."""
    sums: dict[str, list[Tensor]] = {}
    for x, y in zip(*data(N, 1), strict=True):
        h = (model.first.weight @ x).detach().requires_grad_()
        a = torch.tanh(h)
        z = (model.second.weight @ a).detach().requires_grad_()
        F.cross_entropy(z[None], y[None]).backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        gh = (model.second.weight.t() @ z.grad) * (1 - a**2)
        for name, parts in {"first": (x, gh), "second": (a, z.grad)}.items():
            new = [torch.outer(v, v).detach() / N for v in parts]
            old = sums.get(name, [torch.zeros_like(m) for m in new])
            sums[name] = [p + q for p, q in zip(old, new, strict=True)]
    return {name: (A, S) for name, (A, S) in sums.items()}


def test_the_axes_are_the_leading_eigenvectors() -> None:
    model = plain()
    index = indexed(model, rank=3)
    sides = stored_sides(index._folder, index._header)
    for name, (A, S) in covariances(model).items():
        own = sides[f"{name}.weight"]
        for matrix, covariance in ((own.right, A), (own.left, S)):
            assert matrix is not None
            values = torch.linalg.eigvalsh(covariance).flip(0)[:3]
            assert_close(matrix @ covariance @ matrix.t(), torch.diag(values), 1e-9)
            assert_close(matrix @ matrix.t(), torch.eye(3, dtype=torch.float64), 1e-12)


def full_space(model: Plain) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    whole = Projection(kind="none")
    return dense_rows(model, data(N, 1), whole), dense_rows(model, data(5, 2), whole)


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    mean = matrix.diagonal().mean()
    return torch.linalg.inv(matrix + damping * mean * torch.eye(len(matrix), dtype=matrix.dtype))


@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_kfac_is_the_dense_kronecker_product(damping: float) -> None:
    model = plain()
    rows, asked = full_space(model)
    truth = torch.zeros(5, N, dtype=torch.float64)
    for name, (A, S) in covariances(model).items():
        truth += asked[name] @ damped_inverse(torch.kron(S, A), damping) @ rows[name].t()
    found = indexed(model, rank=None).influence(model, queries(), loss_fn, damping=damping, curvature="kfac")
    assert_close(found, truth, 1e-8)


@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_ekfac_is_the_dense_rescaled_eigenbasis(damping: float) -> None:
    model = plain()
    rows, asked = full_space(model)
    truth = torch.zeros(5, N, dtype=torch.float64)
    own = torch.zeros(N, dtype=torch.float64)
    for name, (A, S) in covariances(model).items():
        basis = torch.kron(torch.linalg.eigh(S)[1], torch.linalg.eigh(A)[1])
        values = (rows[name] @ basis).square().mean(0)
        inverse = damped_inverse(basis @ torch.diag(values) @ basis.t(), damping)
        truth += asked[name] @ inverse @ rows[name].t()
        own += ((rows[name] @ inverse) * rows[name]).sum(1)
    index = indexed(model, rank=None)
    assert_close(index.influence(model, queries(), loss_fn, damping=damping, curvature="ekfac"), truth, 1e-8)
    found = index.self_influence(damping=damping, curvature="ekfac")["self_influence"].to_torch()
    assert_close(found, own, 1e-8)


def test_all_axes_and_the_whole_fisher_are_the_unprojected_answer() -> None:
    model = net()
    turned = indexed(model, rank=None)
    whole = Index.build(model, examples(), loss_fn, projection=Projection(kind="none"), dtype="fp64")
    assert_close(
        turned.influence(model, queries(), loss_fn), whole.influence(model, queries(), loss_fn), 1e-8
    )


@pytest.mark.parametrize("name", ["gpt_untied", "gpt2", "cnn"])
def test_rows_of_any_model_are_the_gradients_along_its_axes(name: str) -> None:
    """A table whose vocabulary has no covariance keeps a random side."""
    case = CASES[name]
    loss = case.losses["sum"]
    model, batch = case.model().eval(), case.batch(5, seed=3)
    index = Index.build(
        model,
        [(range(5), batch)],
        loss,
        projection=Projection(rank=3, kind="pca"),
        dtype="fp64",
        reduction="sum",
    )
    sides = stored_sides(index._folder, index._header)
    params = list(model.parameters())
    rows = []
    for i in range(5):
        found = torch.autograd.grad(loss.part(model, batch, i), params)
        names = [name for name, _ in model.named_parameters()]
        parts = []
        for key, g in zip(names, found, strict=True):
            own, matrix = sides[key], g.reshape(sides[key].matrix)
            assert max(own.ranks) <= 3
            matrix = matrix if own.left is None else own.left.double() @ matrix
            parts.append((matrix if own.right is None else matrix @ own.right.double().t()).flatten())
        rows.append(torch.cat(parts))
    assert_close(index.gradients(), torch.stack(rows))


def test_examples_that_can_be_read_only_once_are_refused() -> None:
    with pytest.raises(InputError, match="only once"):
        Index.build(plain(), iter(examples()), loss_fn, projection=Projection(rank=2, kind="pca"))
